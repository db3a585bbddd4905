"""The matching loss of a regression."""

import torch

from lightning_reg.techniques.outputs.matching_surrogate_loss import matching_surrogate_loss
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import RegressorHost


def _expected(probe):
    z = probe.logits
    return (torch.log(torch.cosh(z)) - probe.targets * z).mean()


def _function():
    draws = torch.Generator().manual_seed(0)
    z, y = (torch.randn(5, dtype=torch.float64, generator=draws) for _ in range(2))
    return lambda z: matching_surrogate_loss(z, y, "probit"), (z.requires_grad_(),)


CASES = {
    "MatchingSurrogateLoss": ContractCase(
        args={"strength": 0.5, "activation": "tanh"},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"activation": "step"}],
        host=RegressorHost,
        expected=_expected,
        gradcheck=_function,
    ),
}
