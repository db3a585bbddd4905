"""Techniques that train a second network."""

import torch

from lightning_reg.techniques.noisy_labels.co_teaching import co_teaching
from lightning_reg.testing import ContractCase


def _losses(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _expected(probe):
    peer = probe.technique.peer.double().eval()
    losses = [_losses(x, probe.targets) for x in (probe.logits, peer(probe.inputs))]
    return co_teaching(*losses, 0.5)[0]


def _function():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
    own, peer = (draw.requires_grad_() for draw in draws)
    targets = torch.tensor([0, 1, 2, 3, 1, 0])
    return lambda a, b: co_teaching(_losses(a, targets), _losses(b, targets), 0.5), (own, peer)


CASES = {
    "CoTeaching": ContractCase(
        args={"forget_rate": 0.5, "num_gradual": 0},
        neutral={"forget_rate": 0.0},
        bad=[
            {"forget_rate": 1.0},
            {"forget_rate": -0.1},
            {"num_gradual": -1},
            {"exponent": 0.0},
            {"start": -1},
            {"select": "test"},
            {"peer": "resnet"},
            {"replaces": "all"},
        ],
        expected=_expected,
        gradcheck=_function,
        logs=("reg/co_teaching", "reg/co_teaching_peer"),
    ),
}
