"""A small network trained on digits, and digits that were shifted since."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.engine.simple import trainer


class Digits(L.LightningModule):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10)
        )
        self.right = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.right += (logits.argmax(1) == batch[1]).tolist()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def trained(seed):
    """A module, and its training and test data."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:900], order[900:1700]
    module = Digits(seed)
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=100)
    trainer(max_epochs=6).fit(module, loader)
    return module, ((x[train], y[train]), (x[test], y[test]))


def shifted(data, noise=0.35):
    """Less contrast, an offset, and noise."""
    x, y = data
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return 0.4 * (x + noise * drawn) + 0.5, y


def accuracy(module, data, technique=None, passes=1, batch_size=100):
    """The share of right answers in the last of several passes in one test."""
    x, y = data
    module.right = []
    loader = DataLoader(TensorDataset(x.repeat(passes, 1), y.repeat(passes)), batch_size=batch_size)
    trainer([technique] if technique else []).test(module, loader, verbose=False)
    return sum(module.right[-len(x) :]) / len(x)
