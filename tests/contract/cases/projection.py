"""Constraints on weights."""

import torch

from lightning_reg.techniques.weights.logit_attenuating_weight_norm import (
    logit_attenuating_weight_norm,
)
from lightning_reg.testing import ContractCase


def _onto_sphere():
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    inputs = (w.requires_grad_(), g.requires_grad_())
    return (lambda w, g: logit_attenuating_weight_norm(w, g, 1.5)), inputs


CASES = {
    "LogitAttenuatingWeightNorm": ContractCase(
        args={"free_epochs": 0},
        neutral={"strength": 0.0},
        bad=[{"strength": 1.5}, {"free_epochs": -1}, {"free_epochs": 0.5}],
        bad_late=[{"parameters": "no_such_name"}],
        gradcheck=_onto_sphere,
    ),
}
