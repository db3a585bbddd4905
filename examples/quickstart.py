"""Digits with 40 % wrong training labels: SAM and EarlyLearning, without touching the module.

Run: ``python examples/quickstart.py [epochs]`` (a few seconds).
"""

import sys

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import SAM, CalibrationMonitor, EarlyLearning, IndexedDataset


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
        )

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self(batch[0])  # CalibrationMonitor reads the logits and logs val/accuracy, val/ece, ...

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def main(epochs: int = 30) -> dict[str, float]:
    L.seed_everything(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    wrong = torch.rand(1200) < 0.4
    noisy = torch.where(wrong, (y[:1200] + torch.randint(1, 10, (1200,))) % 10, y[:1200])
    # EarlyLearning remembers each sample, so the dataset has to tell which one it is.
    training = IndexedDataset(TensorDataset(x[:1200], noisy))
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[SAM(rho=0.05), EarlyLearning(strength=3.0), CalibrationMonitor(figures=False)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    held_out = DataLoader(TensorDataset(x[1200:], y[1200:]), batch_size=597)
    trainer.fit(Net(), DataLoader(training, batch_size=64, shuffle=True), held_out)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    for name, value in main(*map(int, sys.argv[1:])).items():
        print(f"{name}: {value:.4f}")
