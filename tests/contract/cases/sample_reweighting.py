"""Techniques that weight samples."""

import torch

from lightning_reg.techniques.reweighting.dynamic_loss_reweighting import (
    dynamic_loss_reweighting,
)
from lightning_reg.testing import ContractCase


def _expected(probe):
    losses = torch.nn.functional.cross_entropy(probe.logits, probe.targets, reduction="none")
    weights = dynamic_loss_reweighting(losses, 0.4)
    return 1 / (len(weights) * weights.square().sum())


def _function():
    losses = torch.tensor([0.1, 0.7, 1.3, 2.9, 1.9], dtype=torch.float64, requires_grad=True)
    return lambda x: dynamic_loss_reweighting(x, 0.7, "quadratic"), (losses,)


CASES = {
    "DynamicLossReweighting": ContractCase(
        args={"temperature": 0.4, "warmup": 0},
        neutral={"strength": 0.0},
        bad=[
            {"strategy": "upper"},
            {"temperature": 0.0},
            {"warmup": -1},
            {"strength": 2.0},
            {"replaces": "all"},
        ],
        expected=_expected,
        gradcheck=_function,
        logs=("reg/dynamic_loss_reweighting",),
    ),
}
