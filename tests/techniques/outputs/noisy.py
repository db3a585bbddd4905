"""A network that fits noise, and how overconfident it ends."""

from __future__ import annotations

from functools import lru_cache

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.engine.simple import trainer


class Noisy(L.LightningModule):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(10, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def noisy_data(seed, size):
    """Ten features, three classes, and labels of which 30 % are drawn at random."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 10, generator=draws)
    y = x[:, :3].argmax(1)
    noise = torch.rand(size, generator=draws) < 0.3
    return x, torch.where(noise, torch.randint(0, 3, (size,), generator=draws), y)


def overconfidence(callbacks, seed, epochs=40):
    """Mean held-out confidence minus accuracy after training on 300 samples."""
    module = Noisy(seed)
    loader = DataLoader(TensorDataset(*noisy_data(seed, 300)), batch_size=100)
    trainer(callbacks, max_epochs=epochs, log_every_n_steps=50).fit(module, loader)
    x, y = noisy_data(100 + seed, 2000)
    with torch.no_grad():
        p = module(x).softmax(1)
    return float(p.amax(1).mean() - (p.argmax(1) == y).float().mean())


@lru_cache
def plain_overconfidence(seed):
    """That of the cross-entropy alone."""
    return overconfidence([], seed)
