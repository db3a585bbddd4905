"""Penalties on derivatives by the input.

With ``projections="exact"``: random projections are drawn per rank and micro-batch, so a joint
batch has others.
"""

import torch

from lightning_reg.techniques.gradients.jacobian_penalty import jacobian_penalty
from lightning_reg.techniques.gradients.reconstruction_contraction import (
    reconstruction_contraction,
)
from lightning_reg.testing import AutoencoderHost, ContractCase


def _pair():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    return x, weight


def _jacobian(x, weight):
    return jacobian_penalty(torch.tanh(x @ weight), x)


def _contraction(x, weight):
    return reconstruction_contraction(torch.tanh(x @ weight), x, reduction="mean")


CASES = {
    "JacobianPenalty": ContractCase(
        args={"strength": 0.3, "projections": "exact"},
        neutral={"strength": 0.0},
        bad=[{"projections": 0}, {"projections": "all"}, {"layer": ""}],
        bad_late=[{"layer": "no_such_layer"}],
        expected=lambda probe: jacobian_penalty(probe.logits, probe.inputs).mean(),
        gradcheck=lambda: (_jacobian, _pair()),
    ),
    "ReconstructionContraction": ContractCase(
        args={"strength": 0.5, "projections": "exact"},
        neutral={"strength": 0.0},
        bad=[{"projections": 0}, {"reduction": "none"}, {"layer": ""}],
        bad_late=[{"layer": "no_such_layer"}],
        host=AutoencoderHost,
        expected=lambda probe: reconstruction_contraction(
            probe.logits, probe.inputs, reduction="mean"
        ).mean(),
        gradcheck=lambda: (_contraction, _pair()),
    ),
}
