"""Margin control."""

import torch

from lightning_reg.techniques.outputs.margin_control import margin_control
from lightning_reg.testing import ContractCase


def _logits():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.3, -3.0, 4.0]], dtype=torch.float64)
    return logits.requires_grad_()


CASES = {
    "MarginControl": ContractCase(
        args={"strength": 2.0},
        neutral={"strength": 0.0},
        bad=[{"strength": -0.1}, {"ignore_index": 1.5}, {"class_dim": "last"}],
        expected=lambda probe: margin_control(probe.logits),
        gradcheck=lambda: (margin_control, (_logits(),)),
    ),
}
