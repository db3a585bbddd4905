"""Losses for imbalanced classes and for wrong labels, in place of the cross-entropy."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.noisy_labels.generalized_cross_entropy import (
    generalized_cross_entropy,
)
from lightning_reg.techniques.noisy_labels.symmetric_cross_entropy import symmetric_cross_entropy
from lightning_reg.techniques.reweighting.class_balanced_loss import class_balanced_loss
from lightning_reg.techniques.reweighting.label_distribution_aware_margin import (
    label_distribution_aware_margin,
)
from lightning_reg.techniques.reweighting.logit_adjusted_loss import logit_adjusted_loss
from lightning_reg.testing import ContractCase

_SCORES = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
_LABELS = F.one_hot(torch.tensor([0, 1, 2, 3, 1]), 4).double()
_COUNTS = [10.0, 40.0, 2.0, 5.0]


def _function(loss, *settings):
    return lambda s: loss(s, _LABELS, *settings), (_SCORES.clone().requires_grad_(),)


def _own(probe):
    return probe.logits.softmax(1)[torch.arange(len(probe.targets)), probe.targets]


def _generalized(probe):
    return ((1 - _own(probe) ** 0.6) / 0.6).mean()


def _symmetric(probe):
    p = _own(probe)
    return (-0.5 * p.log() + 2.0 * 4.0 * (1 - p)).mean()


def _adjusted(probe):
    prior = torch.tensor(_COUNTS) / sum(_COUNTS)
    weighted = probe.logits.exp() * prior**1.5
    chosen = weighted[torch.arange(len(weighted)), probe.targets]
    return -(chosen / weighted.sum(1)).log().mean()


def _balanced(probe):
    weights = 0.1 / (1 - 0.9 ** torch.tensor(_COUNTS))
    weights = weights * 4 / weights.sum()
    p = _own(probe)
    return (weights[probe.targets] * (1 - p) ** 2 * -p.log()).mean()


def _margins(probe):
    margins = 0.4 * (2.0 / torch.tensor(_COUNTS)) ** 0.25
    scores = probe.logits.clone()
    rows = torch.arange(len(scores))
    scores[rows, probe.targets] -= margins[probe.targets]
    return F.cross_entropy(3 * scores, probe.targets)


_BAD = [{"strength": 1.5}, {"strength": -1.0}, {"replaces": "all"}]
_BAD_COUNTS = [
    *_BAD,
    {"class_counts": [10.0]},
    {"class_counts": [10.0, 0.0, 1.0, 1.0]},
    {"class_counts": "auto"},
]

CASES = {
    "GeneralizedCrossEntropy": ContractCase(
        args={"q": 0.6},
        neutral={"strength": 0.0},
        bad=[*_BAD, {"q": 0.0}, {"q": 1.5}, {"k": 0.0}, {"k": 1.0}, {"truncate_from": -1}],
        expected=_generalized,
        gradcheck=lambda: _function(generalized_cross_entropy, 0.6, 0.1),
        logs=("reg/generalized_cross_entropy",),
    ),
    "SymmetricCrossEntropy": ContractCase(
        args={"alpha": 0.5, "beta": 2.0, "log_zero": -4.0},
        neutral={"strength": 0.0},
        bad=[*_BAD, {"alpha": -1.0}, {"beta": -1.0}, {"log_zero": 0.0}],
        expected=_symmetric,
        gradcheck=lambda: _function(symmetric_cross_entropy, 0.5, 2.0, -4.0),
        logs=("reg/symmetric_cross_entropy",),
    ),
    "LogitAdjustedLoss": ContractCase(
        args={"class_counts": _COUNTS, "tau": 1.5},
        neutral={"strength": 0.0},
        bad=[*_BAD_COUNTS, {"tau": 0.0}],
        expected=_adjusted,
        gradcheck=lambda: _function(logit_adjusted_loss, torch.tensor(_COUNTS).double(), 1.5),
        logs=("reg/logit_adjusted_loss",),
    ),
    "ClassBalancedLoss": ContractCase(
        args={"class_counts": _COUNTS, "beta": 0.9, "gamma": 2.0},
        neutral={"strength": 0.0},
        bad=[*_BAD_COUNTS, {"beta": 1.0}, {"gamma": -1.0}],
        expected=_balanced,
        gradcheck=lambda: _function(class_balanced_loss, torch.tensor(_COUNTS).double(), 1.5),
        logs=("reg/class_balanced_loss",),
    ),
    "LabelDistributionAwareMargin": ContractCase(
        args={"class_counts": _COUNTS, "max_margin": 0.4, "scale": 3.0},
        neutral={"strength": 0.0},
        bad=[
            *_BAD_COUNTS,
            {"max_margin": 0.0},
            {"scale": 0.0},
            {"beta": 1.0},
            {"reweight_from": -1},
        ],
        expected=_margins,
        gradcheck=lambda: _function(
            label_distribution_aware_margin, torch.tensor([0.1, 0.2, 0.5, 0.4]).double(), 3.0
        ),
        logs=("reg/label_distribution_aware_margin",),
    ),
}
