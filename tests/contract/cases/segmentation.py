"""Losses on regions and confusion counts, and what else segmentation brings."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.reweighting.any_loss import any_loss
from lightning_reg.techniques.segmentation.self_adjusting_dice_loss import self_adjusting_dice_loss
from lightning_reg.techniques.segmentation.soft_dice_loss import soft_dice_loss
from lightning_reg.techniques.segmentation.tversky_loss import tversky_loss
from lightning_reg.testing import ContractCase

_BAD_COUNTS = [
    {"strength": -1.0},
    {"task": "binary"},
    {"classes": []},
    {"classes": [-1]},
    {"present_only": "yes"},
    {"ignore_index": 1.5},
]
_BAD_REGIONS = [*_BAD_COUNTS, {"over": "pixel"}, {"smooth": 0.0}]


def _of_counts(function, *args):
    def expected(probe):
        p = probe.logits.softmax(1)
        return function(p, F.one_hot(probe.targets, p.shape[1]).to(p), *args).mean()

    return expected


def _probabilities(function, *args):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(5, 3, dtype=torch.float64, generator=generator) * 0.8 + 0.1
    labels = F.one_hot(torch.tensor([0, 1, 0, 2, 1]), 3).double()
    return lambda: (lambda p: function(p, labels, *args), (p.requires_grad_(),))


CASES = {
    "SoftDiceLoss": ContractCase(
        args={"strength": 4.0, "over": "batch"},
        neutral={"strength": 0.0},
        bad=_BAD_REGIONS,
        expected=_of_counts(soft_dice_loss),
        gradcheck=_probabilities(soft_dice_loss, 1.0, True),
    ),
    "TverskyLoss": ContractCase(
        args={"strength": 4.0, "over": "batch"},
        neutral={"strength": 0.0},
        bad=[*_BAD_REGIONS, {"alpha": -0.1}, {"beta": -0.1}, {"alpha": 0.0, "beta": 0.0}],
        expected=_of_counts(tversky_loss),
        gradcheck=_probabilities(tversky_loss),
    ),
    "SelfAdjustingDiceLoss": ContractCase(
        args={"strength": 4.0, "alpha": 0.5, "over": "position"},
        neutral={"strength": 0.0},
        bad=[*_BAD_REGIONS, {"alpha": -0.1}],
        expected=_of_counts(self_adjusting_dice_loss, 0.5),
        gradcheck=_probabilities(self_adjusting_dice_loss, 0.5, 1.0, True),
    ),
    "AnyLoss": ContractCase(
        args={"strength": 4.0, "metric": "mcc", "slope": 8.0},
        neutral={"strength": 0.0},
        bad=[*_BAD_COUNTS, {"metric": "auc"}, {"beta": 0.0}, {"slope": 0.0}],
        expected=_of_counts(any_loss, "mcc", 1.0, 8.0),
        gradcheck=_probabilities(any_loss, "g_mean", 1.0, 8.0),
    ),
}
