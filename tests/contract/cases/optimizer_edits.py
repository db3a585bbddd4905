"""Edits of gradients and of weights after a step."""

import torch
from torch import nn

from lightning_reg.techniques.gradients.adaptive_gradient_clipping import (
    adaptive_gradient_clipping,
)
from lightning_reg.techniques.gradients.gradient_centralization import gradient_centralization
from lightning_reg.techniques.gradients.gradient_noise import gradient_noise
from lightning_reg.techniques.gradients.truncated_model_step import truncated_model_step
from lightning_reg.techniques.weights.low_rank_projection import low_rank_projection
from lightning_reg.techniques.weights.poincare_projection import poincare_projection
from lightning_reg.testing import ClassifierHost, ContractCase, ImageHost

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


class EmbeddingHost(ClassifierHost):
    """A classifier that adds points of a table to its inputs."""

    def build(self, options):
        super().build(options)
        self.table = nn.Embedding(4, 8)
        nn.init.uniform_(self.table.weight, -0.4, 0.4)

    def forward(self, x):
        ids = (2 * x.detach()[:, 0]).nan_to_num().round().long().clamp(-1, 2) + 1
        return super().forward(x + self.table(ids))


def _shortened(probe):
    weights = [w for w in probe.module.parameters() if w.requires_grad]
    gradients = torch.autograd.grad(probe.loss, weights)
    return truncated_model_step(probe.loss.detach(), gradients, [0.1] * len(weights), 1.45)


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
    "TruncatedModelStep": ContractCase(
        args={"lower_bound": 1.45},
        neutral=NEUTRAL,
        bad=[{"strength": 1.5}, {"lower_bound": float("inf")}],
        bad_late=NOWHERE,
        expected=_shortened,
        gradcheck=lambda: (
            lambda loss, g: truncated_model_step(loss, [g], [3.0]),
            (torch.tensor(0.5, dtype=torch.float64, requires_grad=True), _pair()[1]),
        ),
    ),
    "LowRankProjection": ContractCase(
        args={"rank": 2},
        neutral=NEUTRAL,
        bad=[{"strength": 1.5}, {"rank": 0}, {"rank": 1.5}, {"every": 0}],
        bad_late=[*NOWHERE, {"together": True}],
        host=ImageHost,
        gradcheck=lambda: (lambda w: low_rank_projection(w, 2), _pair()[:1]),
    ),
    "PoincareProjection": ContractCase(
        neutral=NEUTRAL,
        bad=[{"strength": 1.5}, {"eps": 0.0}, {"eps": 1.0}],
        bad_late=NOWHERE,
        host=EmbeddingHost,
        gradcheck=lambda: (poincare_projection, _pair()),
    ),
}
