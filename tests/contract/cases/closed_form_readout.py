"""Layers that are solved for in closed form."""

import numpy as np
import torch
from torch import nn

from lightning_reg.techniques.retrieval.zero_diagonal_ridge import zero_diagonal_ridge
from lightning_reg.techniques.weights.schatten_shrinkage_readout import (
    schatten_shrinkage_readout,
)
from lightning_reg.testing import ContractCase, RegressorHost
from lightning_reg.testing.hosts import AutoencoderHost


class ItemHost(AutoencoderHost):
    """An item-to-item model: ``items`` (8 to 8)."""

    def build(self, options):
        self.encoder = nn.BatchNorm1d(8) if options.batch_norm else nn.Identity()
        self.dropout = nn.Dropout(options.dropout)
        self.items = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.items(self.dropout(self.encoder(x)))


def _nuclear(features, targets, share):
    """The residual of the nuclear estimate, by NumPy from the rows themselves."""
    x = features.detach().numpy() - features.detach().numpy().mean(0)
    y = targets.numpy() - targets.numpy().mean(0)
    left, values, right = np.linalg.svd(x, full_matrices=False)
    kept = values > 1e-7 * values[0]
    left, values, right = left[:, kept], values[kept], right[kept]
    low, high = 0.0, 1e9
    for _ in range(200):
        mu = (low + high) / 2
        bias = np.maximum(0, 1 - mu * values**2).sum()
        low, high = (mu, high) if bias > share * len(values) else (low, mu)
    gains = np.minimum(1, high * values**2)
    found = right.T @ np.diag(gains / values) @ left.T @ y
    return np.square(y - x @ found).sum(1).mean()


def _ease(x, ridge):
    """The residual of ridge regressions of each item on all others."""
    x = x.detach().numpy()
    total = 0.0
    for j in range(x.shape[1]):
        others = np.delete(x, j, 1)
        b = np.linalg.solve(others.T @ others + ridge * np.eye(others.shape[1]), others.T @ x[:, j])
        total += np.square(x[:, j] - others @ b).mean()
    return total


def _gram(size):
    x = torch.randn(10, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.T @ x


def _readout():
    cross = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    return (
        lambda gram, cross: schatten_shrinkage_readout(gram + gram.T, cross, 0.3, "frobenius"),
        (_gram(3).requires_grad_(), cross),
    )


CASES = {
    "SchattenShrinkageReadout": ContractCase(
        args={"shrinkage": 0.3},
        neutral={"strength": 0.0},
        bad=[
            {"strength": 1.5},
            {"shrinkage": 1.5},
            {"shrinkage": -0.1},
            {"norm": "trace"},
            {"features": ""},
            {"layer": ""},
            {"every": 0},
        ],
        bad_late=[{"layer": "encoder"}, {"features": "nowhere"}],
        host=RegressorHost,
        expected=lambda probe: _nuclear(probe.features["encoder"], probe.targets, 0.3),
        gradcheck=_readout,
    ),
    "ZeroDiagonalRidge": ContractCase(
        args={"ridge": 2.0},
        neutral={"strength": 0.0},
        bad=[{"strength": 1.5}, {"ridge": 0.0}, {"ridge": float("inf")}, {"every": 1.5}],
        bad_late=[{"layer": "nowhere"}, {"layer": "unused"}],
        host=ItemHost,
        expected=lambda probe: _ease(probe.inputs, 2.0),
        gradcheck=lambda: (
            lambda gram: zero_diagonal_ridge(gram + gram.T, 0.5),
            (_gram(4).requires_grad_(),),
        ),
    ),
}
