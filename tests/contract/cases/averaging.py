"""Contract cases of the averages of weights."""

import torch

from lightning_reg.techniques.averaging.ema import exponential_average
from lightning_reg.techniques.averaging.swa import stochastic_average
from lightning_reg.testing import ContractCase


def _of(function, number):
    def make():
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(4)]

        def flat(*tensors):
            return tuple(function(tensors[:2], tensors[2:], number))

        return flat, tuple(t.requires_grad_() for t in inputs)

    return make


CASES = {
    "EMA": ContractCase(
        args={"decay": 0.7},
        neutral={"decay": 0.0},
        bad=[{"decay": 1.1}, {"decay": -0.1}, {"every": 0}, {"statistics": "none"}],
        gradcheck=_of(exponential_average, 0.9),
        logs=(),
    ),
    "SWA": ContractCase(
        args={"start": 0, "lr": 0.05, "anneal_epochs": 0},
        neutral={"start": 10},
        bad=[
            {"start": -1},
            {"start": 1.5},
            {"lr": 0.0},
            {"anneal": "step"},
            {"anneal_epochs": -1},
            {"every": 0},
        ],
        gradcheck=_of(stochastic_average, 3),
        logs=(),
    ),
}
