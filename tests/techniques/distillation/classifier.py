"""Small classifiers with an encoder, trained on few digits."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.engine.simple import trainer


class Encoded(L.LightningModule):
    """Digits (64) through ``encoder`` to 16 features, and ``head``."""

    def __init__(self, hidden, seed, lr=0.02):
        super().__init__()
        torch.manual_seed(seed)
        self.lr = lr
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def digits():
    """Inputs and labels of digits, in one random order."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]


def trained(module, x, y, steps, callbacks=()):
    """The module after some steps on batches of 50."""
    run = trainer(callbacks, max_steps=steps, max_epochs=-1)
    draws = torch.Generator().manual_seed(0)
    data = TensorDataset(x, y)
    run.fit(module, DataLoader(data, batch_size=50, shuffle=True, generator=draws))
    return module


def accuracy(module, x, y):
    """The share of right answers."""
    with torch.no_grad():
        return float((module(x).argmax(1) == y).float().mean())
