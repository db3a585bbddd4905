"""Penalties on weights."""

import torch

from lightning_reg.techniques.weights.norm_loss import norm_loss
from lightning_reg.techniques.weights.orthogonal_regularizer import orthogonal_regularizer
from lightning_reg.testing import ContractCase, ImageHost


def _weights(module):
    return [module.stem[0].weight, module.encoder[1].weight, module.head.weight]


def _matrix():
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


CASES = {
    "NormLoss": ContractCase(
        args={"strength": 0.1},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"mode": "both"}, {"parameters": 3}],
        bad_late=[{"parameters": "no_such_name"}],
        host=ImageHost,
        expected=lambda probe: sum(norm_loss(w) for w in _weights(probe.module)),
        gradcheck=lambda: (norm_loss, (_matrix().requires_grad_(),)),
    ),
    "OrthogonalRegularizer": ContractCase(
        args={"strength": 0.05, "form": "full"},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"form": "rows"}, {"mode": "both"}],
        bad_late=[{"parameters": "no_such_name"}],
        host=ImageHost,
        expected=lambda probe: sum(
            orthogonal_regularizer(w, "full") for w in _weights(probe.module)
        ),
        gradcheck=lambda: (orthogonal_regularizer, (_matrix().requires_grad_(),)),
    ),
}
