"""Digits with wrong labels: calibration and overfitting in figures, confidence held by a loop.

Run: ``python examples/calibration_tracking.py [epochs]`` (half a minute). Figures and their numbers
are in ``calibration_tracking/figures``; a logger among the Trainer's would have them instead.
"""

import sys

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    CalibrationMonitor,
    ClosedLoop,
    ConfidencePenalty,
    EntropyMonitor,
    OverfitMonitor,
    PostHocCalibration,
)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
        )

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def main(epochs: int = 60, folder: str = "calibration_tracking") -> dict[str, float]:
    L.seed_everything(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    y = torch.where(torch.rand(len(y)) < 0.3, torch.randint(0, 10, y.shape), y)
    # The penalty grows while the network is surer than it is right, and shrinks when it is not.
    strength = ClosedLoop("val/confidence_gap", target=0.0, gain=2.0, high=5.0)
    calibration = CalibrationMonitor(
        num_classes=10,
        metrics=["confidence_gap", "smece", "aurc"],
        figures=[
            "reliability",
            "classwise",
            "smooth",
            "risk_coverage",
            "temperature",
            "drift",
            "strength",
        ],
        every_n_epochs=20,
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[
            ConfidencePenalty(strength),
            calibration,
            EntropyMonitor(num_classes=10, every_n_epochs=20),
            OverfitMonitor(every_n_epochs=20),
            PostHocCalibration(),
        ],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    training = DataLoader(TensorDataset(x[:600], y[:600]), batch_size=100, shuffle=True)
    held_out = DataLoader(TensorDataset(x[600:], y[600:]), batch_size=1197)
    trainer.fit(Net(), training, held_out)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    for name, value in main(*map(int, sys.argv[1:])).items():
        print(f"{name}: {value:.4f}")
