"""Penalties on the predicted distribution."""

import torch

from lightning_reg.techniques.outputs.confidence_penalty import confidence_penalty
from lightning_reg.techniques.outputs.entropy_penalty import entropy_penalty
from lightning_reg.testing import ContractCase


def _logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)


CASES = {
    "ConfidencePenalty": ContractCase(
        args={"strength": 0.5, "threshold": 1.37},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -0.1},
            {"threshold": 0.0},
            {"threshold": "low"},
            {"ignore_index": 1.5},
            {"class_dim": "last"},
        ],
        expected=lambda probe: confidence_penalty(probe.logits, 1.37).mean(),
        gradcheck=lambda: (lambda z: confidence_penalty(z, 1.2), (_logits(),)),
    ),
    "EntropyPenalty": ContractCase(
        args={"strength": 0.5, "direction": "minimize"},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -0.1},
            {"direction": "up"},
            {"ignore_index": True},
            {"class_dim": 1.0},
        ],
        expected=lambda probe: entropy_penalty(probe.logits).mean(),
        gradcheck=lambda: (entropy_penalty, (_logits(),)),
    ),
}
