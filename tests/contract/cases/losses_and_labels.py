"""Losses in place of the cross-entropy, and softer labels."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.language.earth_mover_token_loss import expected_distance
from lightning_reg.techniques.outputs.comp_sum_loss import (
    comp_sum_loss,
    smooth_adversarial_comp_sum,
)
from lightning_reg.techniques.outputs.direct_coverage_optimization import (
    direct_coverage_optimization,
)
from lightning_reg.techniques.outputs.ens_loss import ens_loss
from lightning_reg.techniques.outputs.palm_z_loss import palm_z_loss
from lightning_reg.techniques.outputs.spherical_z_loss import spherical_z_loss
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


def _comp_sum(probe):
    return ((1 - _own(probe) ** 0.6) / 0.6).mean()


def _z_score(probe):
    z = probe.logits
    scores = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, correction=0)
    own = scores[torch.arange(len(z)), probe.targets]
    return torch.log1p(torch.exp(2.0 * (1.0 - own))).mean() / 2.0


def _distance():
    unit = F.normalize(_SCORES[:4, :3].detach(), dim=1)
    return lambda z: expected_distance(z, _LABELS, unit), (_SCORES.clone().requires_grad_(),)


def _slopes():
    """Slopes are held fixed, and margins below 1, where a slope is the same nearby."""
    draws = _SCORES[:, 0].detach().clone()
    margins = torch.tensor([-2.0, 0.3, -0.7, 0.9, -0.1], dtype=torch.float64, requires_grad=True)
    return lambda z: ens_loss(z, draws, 0.5), (margins,)


def _adversarial():
    moved = (_SCORES + 0.3 * _SCORES.sin()).requires_grad_()

    def function(z, other):
        return smooth_adversarial_comp_sum(z, other, _LABELS, 1.4, 0.5, 2.0)

    return function, (_SCORES.clone().requires_grad_(), moved)


CASES = {
    "CompSumLoss": ContractCase(
        args={"tau": 1.6},
        neutral={"strength": 0.0},
        bad=[*_SHARE, {"tau": -1.0}],
        expected=_comp_sum,
        gradcheck=lambda: _function(comp_sum_loss, 0.5),
        logs=("reg/comp_sum_loss",),
    ),
    "SmoothAdversarialCompSum": ContractCase(
        # Without a random start, where ranks and micro-batches can be compared with a joint batch.
        args={"tau": 1.6, "nu": 1.0, "epsilon": 0.4, "steps": 2, "random_start": 0.0},
        neutral={"strength": 0.0},
        bad=[
            *_SHARE,
            {"tau": -1.0},
            {"rho": 0.0},
            {"nu": -1.0},
            {"epsilon": 0.0},
            {"steps": 0},
            {"norm": "l1"},
            {"bounds": [1.0, 0.0]},
        ],
        expected=_comp_sum,
        gradcheck=_adversarial,
        logs=("reg/smooth_adversarial_comp_sum", "reg/smooth_adversarial_comp_sum_shift"),
    ),
    "DirectCoverageOptimization": ContractCase(
        args={"n": 4.0},
        neutral={"strength": 0.0},
        bad=[*_SHARE, {"n": 0.5}, {"unit": "token"}],
        expected=_coverage,
        gradcheck=lambda: _function(direct_coverage_optimization, 4.0),
        logs=("reg/direct_coverage_optimization", "reg/direct_coverage_optimization_factor"),
    ),
    "SphericalZLoss": ContractCase(
        # A share: steps are large beside the small logits of the host, and amplify rounding.
        args={"strength": 0.3, "a": 2.0, "b": 1.0},
        neutral={"strength": 0.0},
        bad=[*_SHARE, {"a": 0.0}],
        expected=_z_score,
        gradcheck=lambda: _function(spherical_z_loss, 2.0),
        logs=("reg/spherical_z_loss",),
    ),
    "PaLMZLoss": ContractCase(
        args={"strength": 0.5},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}],
        expected=lambda probe: probe.logits.exp().sum(1).log().square().mean(),
        gradcheck=lambda: (palm_z_loss, (_SCORES.clone().requires_grad_(),)),
    ),
    "EarthMoverTokenLoss": ContractCase(
        args={"head": "head"},
        neutral={"strength": 0.0},
        bad=[*_SHARE, {"head": ""}, {"cost": "moving"}],
        bad_late=[{"head": "decoder"}],
        # The value is that of the cross-entropy, whatever the distances.
        expected=lambda probe: probe.loss,
        gradcheck=_distance,
        logs=("reg/earth_mover_token_loss", "reg/earth_mover_token_loss_distance"),
    ),
    "EnsLoss": ContractCase(
        args={"box_cox": 0.5},
        neutral={"strength": 0.0},
        bad=[*_SHARE, {"box_cox": 1.5}, {"period": 0}],
        gradcheck=_slopes,
        logs=("reg/ens_loss", "reg/ens_loss_margin"),
    ),
}
