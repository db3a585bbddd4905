"""Contract settings of what makes the path of weights smooth."""

import torch

from lightning_reg.techniques.gradients.smooth_expert_trajectory import smooth_expert_penalty
from lightning_reg.testing import ContractCase


def _penalty(weight):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    return smooth_expert_penalty(torch.tanh(x @ weight), x)


def _weight():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, dtype=torch.float64, generator=generator, requires_grad=True)


CASES = {
    "SmoothExpertTrajectory": ContractCase(
        args={"strength": 2.0, "clip": [0.5], "record": True, "average": 0.5},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"clip": [0.0]},
            {"clip": "half"},
            {"center": -1.0},
            {"average": 1.0},
            {"layer": ""},
        ],
        bad_late=[{"layer": "no_such_layer"}],
        expected=lambda p: smooth_expert_penalty(p.logits, p.inputs).mean(),
        gradcheck=lambda: (_penalty, (_weight(),)),
    ),
}
