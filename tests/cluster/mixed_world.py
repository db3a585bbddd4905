"""One small training under `ddp_reg`, by the import name of Lightning in PACKAGE.

Run: ``python -m tests.cluster.mixed_world MODE...``; prints the weights after each as JSON.
"""

import importlib
import json
import os
import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

PACKAGE = os.environ.get("PACKAGE", "lightning.pytorch")
pl = importlib.import_module(PACKAGE)
reg = importlib.import_module("lightning_reg")  # after Lightning, which it registers itself with

JOINT_BATCH = 16
_generator = torch.Generator().manual_seed(0)
DATA = TensorDataset(
    torch.randn(64, 8, generator=_generator), torch.randint(0, 4, (64,), generator=_generator)
)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def callbacks():
    """Techniques whose value over ranks is that of the joint batch, and a monitor."""
    return [
        reg.NormLoss(0.1),
        reg.LabelSmoothing(0.1),
        reg.ConfidencePenalty(0.1),
        reg.EarlyLearning(1.0),
        reg.CalibrationMonitor(figures=False),
    ]


def loaders(ranks):
    size = JOINT_BATCH // ranks
    training = DataLoader(reg.IndexedDataset(DATA), batch_size=size)
    return training, DataLoader(DATA, batch_size=size)


SETTINGS = {
    "max_epochs": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(strategy, devices):
    module = Net()
    trainer = pl.Trainer(
        strategy=strategy, accelerator="auto", devices=devices, callbacks=callbacks(), **SETTINGS
    )
    assert type(trainer.accelerator).__name__ == "CPUAccelerator"
    assert type(trainer.strategy).__module__.startswith("lightning_reg.strategies.ddp_reg")
    trainer.fit(module, *loaders(devices))
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    return {"weights": module.layer.weight.flatten().tolist(), "metrics": metrics}


MODES = {
    "notebook": ("ddp_reg_notebook", 2),
    "spawn": ("ddp_reg_spawn", 2),
    "one": ("ddp_reg", 1),
}

if __name__ == "__main__":
    print(json.dumps({mode: fit(*MODES[mode]) for mode in sys.argv[1:]}))
