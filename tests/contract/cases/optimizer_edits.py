"""Edits of gradients and of weights after a step."""

import torch

from lightning_reg.techniques.gradients.adaptive_gradient_clipping import (
    adaptive_gradient_clipping,
)
from lightning_reg.techniques.gradients.gradient_centralization import gradient_centralization
from lightning_reg.techniques.gradients.gradient_noise import gradient_noise
from lightning_reg.testing import ContractCase, ImageHost

NEUTRAL = {"strength": 0.0}
NOWHERE = [{"parameters": "no_such_name"}]


def _pair():
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    return w.requires_grad_(), g.requires_grad_()


def _noisy(gradient):
    return gradient_noise([gradient], 3, torch.Generator().manual_seed(0))[0]


def _clipped_share(probe):
    weights = [w for w in probe.module.parameters() if w.requires_grad]
    gradients = torch.autograd.grad(probe.loss, weights)
    clipped = []
    for w, g in zip(weights, gradients, strict=True):
        rows = 1 if w.ndim > 1 else 0
        found = adaptive_gradient_clipping(w, g, 0.02)
        norms = [t.flatten(rows).norm(dim=-1).reshape(-1) for t in (found, g)]
        clipped.append(norms[0] < norms[1] * (1 - 1e-9))
    return torch.cat(clipped).double().mean()


def _mean_share(probe):
    weights = [
        probe.module.stem[0].weight,
        probe.module.encoder[1].weight,
        probe.module.head.weight,
    ]
    gradients = torch.autograd.grad(probe.loss, weights)
    left = sum(gradient_centralization(g).square().sum() for g in gradients)
    return 1 - left / sum(g.square().sum() for g in gradients)


CASES = {
    "AdaptiveGradientClipping": ContractCase(
        args={"clip": 0.02},
        neutral=NEUTRAL,
        bad=[{"strength": 1.5}, {"clip": 0.0}, {"eps": 0.0}],
        bad_late=NOWHERE,
        host=ImageHost,
        expected=_clipped_share,
        gradcheck=lambda: (adaptive_gradient_clipping, _pair()),
    ),
    "GradientCentralization": ContractCase(
        neutral=NEUTRAL,
        bad=[{"strength": 1.5}],
        bad_late=NOWHERE,
        host=ImageHost,
        expected=_mean_share,
        gradcheck=lambda: (gradient_centralization, _pair()[1:]),
    ),
    "GradientNoise": ContractCase(
        args={"eta": 0.3},
        neutral=NEUTRAL,
        bad=[{"strength": 1.5}, {"eta": -1.0}, {"gamma": -1.0}],
        bad_late=NOWHERE,
        expected=lambda probe: 0.3**0.5,
        gradcheck=lambda: (_noisy, _pair()[1:]),
    ),
}
