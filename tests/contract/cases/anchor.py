"""Techniques that pull weights to a reference."""

import torch

from lightning_reg.techniques.continual.previous_task_anchor import previous_task_anchor
from lightning_reg.testing import ContractCase


def _pull(probe):
    technique = probe.technique
    weights = technique.selection.select(probe.module)
    return sum(previous_task_anchor(w, technique.reference[n]) for n, w in weights.items())


def _gradcheck():
    tensors = [torch.rand(3, 2, dtype=torch.float64) for _ in range(3)]
    return previous_task_anchor, (tensors[0].requires_grad_(), *tensors[1:])


CASES = {
    "PreviousTaskAnchor": ContractCase(
        args={"strength": 1.0},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"importance": "ewc"}, {"fisher_samples": 0}],
        bad_late=[{"parameters": "no_such_name"}],
        expected=_pull,
        gradcheck=_gradcheck,
    ),
}
