"""A small network on handwritten digits, some of whose training labels may be wrong."""

from __future__ import annotations

from functools import lru_cache

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import IndexedDataset
from tests.engine.simple import trainer


class Digits(L.LightningModule):
    def __init__(self, seed, dropout=0.0, width=64, lr=0.01, classes=10):
        super().__init__()
        torch.manual_seed(seed)
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, classes)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


@lru_cache
def digits():
    """All images (N, 64) in [0, 1] and labels (N,)."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y, dtype=torch.long)


def split(seed, size):
    """``size`` training samples, and 800 others."""
    x, y = digits()
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draws)
    train, test = order[:size], order[-800:]
    return (x[train], y[train].clone()), (x[test], y[test])


def symmetric_noise(labels, share, seed, classes=10):
    """``share`` of the labels drawn anew from the other classes."""
    draws = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=draws) < share
    shift = torch.randint(1, classes, (len(labels),), generator=draws)
    return torch.where(wrong, (labels + shift) % classes, labels)


def predictions(callbacks, seed, size=400, noise=0.0, epochs=30, indexed=False, **settings):
    """Logits and labels of held-out digits after training."""
    (x, y), (held, labels) = split(seed, size)
    data = TensorDataset(x, symmetric_noise(y, noise, seed))
    loader = DataLoader(IndexedDataset(data) if indexed else data, batch_size=100)
    module = Digits(seed, **settings)
    trainer(callbacks, max_epochs=epochs, log_every_n_steps=1000).fit(module, loader)
    module.eval()
    with torch.no_grad():
        return module(held), labels


def accuracy(logits, labels):
    """The share of right answers."""
    return float((logits.argmax(1) == labels).float().mean())


def calibration_error(logits, labels, bins=15):
    """The mean gap of confidence and accuracy over bins of equal width, by samples (ECE)."""
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == labels).float()
    place = (confidence * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins).index_add(0, place, confidence - right)
    return float(gaps.abs().sum() / len(labels))
