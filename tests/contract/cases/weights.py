"""Penalties and constraints on weights: the textbook's."""

import torch

from lightning_reg.techniques.weights.elastic_net import elastic_net
from lightning_reg.techniques.weights.group_lasso import group_lasso
from lightning_reg.techniques.weights.l1_penalty import l1_penalty
from lightning_reg.techniques.weights.l2_penalty import l2_penalty
from lightning_reg.techniques.weights.l2_sp import l2_sp
from lightning_reg.techniques.weights.max_norm import max_norm
from lightning_reg.techniques.weights.nuclear_norm import nuclear_norm
from lightning_reg.testing import ContractCase, ImageHost


def _weights(module):
    return [module.stem[0].weight, module.encoder[1].weight, module.head.weight]


def _sum_of(function):
    return lambda probe: sum(function(w) for w in _weights(probe.module))


def _check(function, scale=1.0):
    matrix = scale * torch.randn(
        3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return lambda: (function, (matrix.clone().requires_grad_(),))


NEUTRAL = {"strength": 0.0}
NOWHERE = [{"parameters": "no_such_name"}]

CASES = {
    "L1Penalty": ContractCase(
        args={"strength": 0.05},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"mode": "both"}, {"parameters": 3}],
        bad_late=NOWHERE,
        host=ImageHost,
        expected=_sum_of(l1_penalty),
        gradcheck=_check(l1_penalty),
    ),
    "L2Penalty": ContractCase(
        args={"strength": 0.5},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"mode": "both"}],
        bad_late=NOWHERE,
        host=ImageHost,
        expected=_sum_of(l2_penalty),
        gradcheck=_check(l2_penalty),
    ),
    "ElasticNet": ContractCase(
        args={"strength": 0.2, "l1_ratio": 0.3, "mode": "proximal"},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"l1_ratio": 1.1}, {"mode": "both"}],
        bad_late=NOWHERE,
        host=ImageHost,
        gradcheck=_check(elastic_net),
    ),
    "GroupLasso": ContractCase(
        args={"strength": 0.05, "groups": "columns"},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"groups": "layers"}, {"mode": "both"}],
        bad_late=NOWHERE,
        host=ImageHost,
        expected=_sum_of(lambda w: group_lasso(w, "columns")),
        gradcheck=_check(group_lasso),
    ),
    "NuclearNorm": ContractCase(
        args={"strength": 0.2},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"mode": "both"}],
        bad_late=NOWHERE,
        host=ImageHost,
        expected=_sum_of(nuclear_norm),
        gradcheck=_check(nuclear_norm),
    ),
    "MaxNorm": ContractCase(
        args={"radius": 0.4},
        neutral=NEUTRAL,
        bad=[{"strength": 1.5}, {"radius": 0.0}, {"radius": float("inf")}],
        bad_late=NOWHERE,
        host=ImageHost,
        gradcheck=_check(max_norm, scale=3.0),
    ),
    "L2SP": ContractCase(
        args={"strength": 1.0, "new": "head", "new_ratio": 0.5},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"new_ratio": -0.1}, {"mode": "loss"}],
        bad_late=[*NOWHERE, {"new": "no_such_name"}],
        host=ImageHost,
        # In the first step only the new layer is away from where it is pulled.
        expected=lambda probe: 0.5 * probe.module.head.weight.square().sum() / 2,
        gradcheck=lambda: (
            lambda w: l2_sp(w, torch.ones(3, dtype=torch.float64)),
            (torch.rand(3, dtype=torch.float64).requires_grad_(),),
        ),
    ),
}
