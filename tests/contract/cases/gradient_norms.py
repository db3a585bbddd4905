"""Penalties on the gradient by the weights."""

import torch

from lightning_reg.techniques.gradients.finite_difference_gradient_regularizer import (
    finite_difference_gradient,
)
from lightning_reg.techniques.gradients.gradient_norm_penalty import gradient_norm_penalty
from lightning_reg.testing import ContractCase


def _loss(weight):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    return gradient_norm_penalty(torch.tanh(x @ weight).square().sum(), [weight])


def _weight():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, dtype=torch.float64, generator=generator, requires_grad=True)


def _trained(probe):
    return [w for w in probe.module.parameters() if w.requires_grad]


def _penalty(probe):
    # A quarter of the host's learning rate.
    rate = probe.module.options.lr
    return gradient_norm_penalty(probe.loss, _trained(probe)) * rate / 4


def _rise(probe):
    gradients = torch.autograd.grad(probe.loss, _trained(probe))
    with torch.no_grad():
        torch._foreach_add_(_trained(probe), list(gradients), alpha=0.1)
        return probe.module.compute((probe.inputs.detach(), probe.targets))[0] - probe.loss


CASES = {
    "GradientNormPenalty": ContractCase(
        args={"strength": 5.0},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}],
        expected=_penalty,
        gradcheck=lambda: (_loss, (_weight(),)),
    ),
    "FiniteDifferenceGradientRegularizer": ContractCase(
        args={"strength": 0.3, "epsilon": 0.1, "sharpness": "rank"},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"epsilon": 0.0},
            {"difference": "central"},
            {"sharpness": "none"},
        ],
        expected=_rise,
        gradcheck=lambda: (
            lambda g, h: finite_difference_gradient([g], [h], 0.7)[0],
            (_weight(), _weight()),
        ),
        joint={"sharpness": "global"},
    ),
}
