"""Other means of the ranks' gradients."""

import torch

from lightning_reg.techniques.gradients.principal_gradient_aggregation import (
    principal_gradient_aggregation,
)
from lightning_reg.testing import ContractCase


def _aggregation():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    return principal_gradient_aggregation, (g.requires_grad_(),)


CASES = {
    "PrincipalGradientAggregation": ContractCase(
        neutral={"strength": 0.0},
        bad=[{"strength": 1.5}, {"proportion": 0.0}, {"proportion": 1.5}],
        gradcheck=_aggregation,
    ),
}
