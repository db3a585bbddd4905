"""Penalties and losses that keep confidence near accuracy while a network trains."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.outputs.ada_focal import ada_focal
from lightning_reg.techniques.outputs.correctness_aware_penalty import correctness_aware_penalty
from lightning_reg.techniques.outputs.dca import dca
from lightning_reg.techniques.outputs.focal_loss import focal_loss
from lightning_reg.techniques.outputs.mdca import mdca
from lightning_reg.techniques.outputs.mmce import mmce
from lightning_reg.techniques.outputs.soft_binned_ece import soft_binned_ece
from lightning_reg.testing import ContractCase

_CONFIDENCE = torch.tensor([0.9, 0.35, 0.7, 0.55, 0.81], dtype=torch.float64)
_CORRECT = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)


def _row(probe):
    confidence, top = probe.logits.softmax(1).max(1)
    return confidence, (top == probe.targets).to(confidence)


def _balanced(probe):
    confidence, right = _row(probe)
    weights = torch.where(right > 0, 1 - right.mean(), right.mean())
    return (weights * correctness_aware_penalty(confidence, right)).sum() / weights.sum()


def _mdca(probe):
    shares = F.one_hot(probe.targets, probe.logits.shape[1]).to(probe.logits).mean(0)
    return mdca(probe.logits.softmax(1).mean(0), shares)


def _of_confidence(function, *settings):
    r = _CONFIDENCE.clone().requires_grad_()
    return lambda r: function(r, _CORRECT, *settings), (r,)


def _focal():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 1])
    return lambda z: focal_loss(z, labels, 3.0, gamma_below={0.2: 5.0}), (z,)


def _ada(logits, targets):
    edges = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return ada_focal(logits, targets, edges, torch.full((4,), 2.0, dtype=torch.float64))


_SHARED_BAD = [{"strength": -0.1}, {"ignore_index": 1.5}, {"class_dim": "last"}]

CASES = {
    "MMCE": ContractCase(
        args={"strength": 4.0},
        neutral={"strength": 0.0},
        bad=[*_SHARED_BAD, {"weighting": "both"}, {"width": 0.0}],
        expected=lambda probe: mmce(*_row(probe)),
        gradcheck=lambda: _of_confidence(mmce, "weighted"),
    ),
    "SoftBinnedECE": ContractCase(
        args={"strength": 4.0, "temperature": 0.05, "n_bins": 5},
        neutral={"strength": 0.0},
        bad=[*_SHARED_BAD, {"n_bins": 0}, {"temperature": 0.0}, {"variant": "hard"}],
        expected=lambda probe: soft_binned_ece(*_row(probe), 5, 0.05),
        gradcheck=lambda: _of_confidence(soft_binned_ece, 5, 0.05, "binned"),
    ),
    "MDCA": ContractCase(
        args={"strength": 10.0},
        neutral={"strength": 0.0},
        bad=_SHARED_BAD,
        expected=_mdca,
        gradcheck=lambda: (
            lambda p: mdca(p, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)),
            (torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64, requires_grad=True),),
        ),
    ),
    "DCA": ContractCase(
        args={"strength": 10.0},
        neutral={"strength": 0.0},
        bad=_SHARED_BAD,
        expected=lambda probe: dca(*(value.mean() for value in _row(probe))),
        gradcheck=lambda: (
            lambda r: dca(r.mean(), _CORRECT.mean()),
            (_CONFIDENCE.clone().requires_grad_(),),
        ),
    ),
    "CorrectnessAwarePenalty": ContractCase(
        args={"strength": 10.0},
        neutral={"strength": 0.0},
        bad=[*_SHARED_BAD, {"balanced": "yes"}],
        expected=_balanced,
        gradcheck=lambda: _of_confidence(correctness_aware_penalty),
    ),
    "AdaFocal": ContractCase(
        args={"n_bins": 4, "gamma": 2.0},
        neutral={"strength": 0.0},
        bad=[
            {"strength": 1.5},
            {"n_bins": 1},
            {"rate": -1.0},
            {"gamma": 0.0},
            {"lowest": 1.0},
            {"highest": 0.0},
            {"switch": 0.0},
            {"replaces": "all"},
        ],
        expected=lambda probe: _ada(probe.logits, probe.targets).mean(),
        gradcheck=lambda: (_ada, (*_focal()[1], torch.tensor([0, 1, 2, 3, 1]))),
        logs=("reg/ada_focal",),
    ),
    "FocalLoss": ContractCase(
        args={"gamma": 3.0, "gamma_below": {0.2: 5.0}, "alpha": [0.5, 1.0, 1.0, 2.0]},
        neutral={"strength": 0.0},
        bad=[
            {"strength": 1.5},
            {"gamma": -1.0},
            {"gamma_below": 0.2},
            {"gamma_below": {2.0: 5.0}},
            {"alpha": 0.25},
            {"alpha": [-1.0, 1.0, 1.0, 1.0]},
            {"task": "binary"},
            {"task": "multilabel"},
            {"replaces": "all"},
        ],
        expected=lambda probe: focal_loss(
            probe.logits, probe.targets, 3.0, gamma_below={0.2: 5.0}, alpha=[0.5, 1.0, 1.0, 2.0]
        ).mean(),
        gradcheck=_focal,
        logs=("reg/focal_loss",),
    ),
}
