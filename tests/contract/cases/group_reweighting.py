"""Techniques that weight samples by the losses of groups, or of the batch."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.reweighting.group_dro import group_dro
from lightning_reg.techniques.reweighting.kl_robust_reweighting import kl_robust_loss
from lightning_reg.techniques.reweighting.worst_group_loss import worst_group_loss
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import DictBatchHost

_LOSSES = torch.tensor([0.3, 1.7, 0.9, 2.2], dtype=torch.float64)
_BAD = [{"strength": 1.5}, {"replaces": "all"}]


def _losses(probe):
    return F.cross_entropy(probe.logits, probe.targets, reduction="none")


def _effective(weights):
    return weights.sum() ** 2 / (len(weights) * (weights**2).sum())


def _kl(probe):
    weights = (_losses(probe) / 0.5).softmax(0)
    return _effective(weights)


def _function(loss, *settings):
    return lambda x: loss(x, *settings), (_LOSSES.clone().requires_grad_(),)


def _group_function():
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    return lambda x: group_dro(q, x, 0.7), (_LOSSES.clone().requires_grad_(),)


CASES = {
    "GroupDRO": ContractCase(
        args={"num_groups": 4, "step_size": 1.0},
        neutral={"strength": 0.0},
        bad=[
            *_BAD,
            {"num_groups": 0},
            {"step_size": -1.0},
            {"adjustment": 1.0},
            {"group_counts": [1.0, 2.0]},
        ],
        host=DictBatchHost,
        gradcheck=_group_function,
        logs=("reg/group_dro",),
    ),
    "WorstGroupLoss": ContractCase(
        args={"num_groups": 4, "form": "gap", "lam": 0.5},
        neutral={"strength": 0.0},
        bad=[*_BAD, {"num_groups": 0}, {"form": "best"}, {"lam": -1.0}],
        host=DictBatchHost,
        gradcheck=lambda: _function(worst_group_loss, torch.ones(4)),
        logs=("reg/worst_group_loss",),
    ),
    "KLRobustReweighting": ContractCase(
        args={"lam": 0.5},
        neutral={"strength": 0.0},
        bad=[*_BAD, {"lam": 0.0}, {"average": 0.0}, {"average": 1.5}],
        expected=_kl,
        gradcheck=lambda: _function(kl_robust_loss, 0.5),
        logs=("reg/kl_robust_reweighting",),
    ),
}
