"""Losses in place of the cross-entropy, and softer labels."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.outputs.direct_coverage_optimization import (
    direct_coverage_optimization,
)
from lightning_reg.testing import ContractCase

_SCORES = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
_LABELS = F.one_hot(torch.tensor([0, 1, 2, 3, 1]), 4).double()
_SHARE = [{"strength": 1.5}, {"strength": -1.0}, {"replaces": "all"}]


def _function(loss, *settings):
    return lambda s: loss(s, _LABELS, *settings), (_SCORES.clone().requires_grad_(),)


def _own(probe):
    return probe.logits.softmax(1)[torch.arange(len(probe.targets)), probe.targets]


def _coverage(probe):
    return -(1 - (1 - _own(probe)) ** 4).log().mean()


CASES = {
    "DirectCoverageOptimization": ContractCase(
        args={"n": 4.0},
        neutral={"strength": 0.0},
        bad=[*_SHARE, {"n": 0.5}, {"unit": "token"}],
        expected=_coverage,
        gradcheck=lambda: _function(direct_coverage_optimization, 4.0),
        logs=("reg/direct_coverage_optimization", "reg/direct_coverage_optimization_factor"),
    ),
}
