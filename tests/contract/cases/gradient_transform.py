"""Edits of gradients, and the loss that belongs to one of them."""

import torch

from lightning_reg.techniques.gradients.ortho_grad import ortho_grad
from lightning_reg.techniques.outputs.stable_max import stable_max
from lightning_reg.testing import ContractCase


def _radial_share(probe):
    weights = [w for w in probe.module.parameters() if w.requires_grad]
    gradients = torch.autograd.grad(probe.loss, weights)
    radial = sum(
        (w * g).sum().square() / w.square().sum() for w, g in zip(weights, gradients, strict=True)
    )
    return radial / sum(g.square().sum() for g in gradients)


def _projection():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    g = torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    return (lambda g: ortho_grad([w], [g])[0]), (g,)


def _stable_max():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.3, -3.0, 4.0]], dtype=torch.float64)
    return (lambda z: stable_max(z, torch.tensor([0, 1]))), (logits.requires_grad_(),)


CASES = {
    "OrthoGrad": ContractCase(
        neutral={"strength": 0.0},
        bad=[{"strength": -0.1}, {"strength": 1.1}, {"parameters": 3}],
        bad_late=[{"parameters": "no_such_name"}],
        expected=_radial_share,
        gradcheck=_projection,
    ),
    "StableMax": ContractCase(
        neutral={"strength": 0.0},
        bad=[{"strength": -0.1}, {"strength": 1.1}, {"replaces": "nothing"}],
        expected=lambda probe: stable_max(probe.logits, probe.targets).mean(),
        gradcheck=_stable_max,
    ),
}
