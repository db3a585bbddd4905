"""Weights as functions of other weights."""

import torch

from lightning_reg.techniques.reparameterization.weight_compander import weight_compander
from lightning_reg.testing import ContractCase


def _arctangent():
    v = torch.tensor([-2.0, 0.1, 3.0], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    return weight_compander, (v, alpha, beta)


CASES = {
    "WeightCompander": ContractCase(
        args={"alpha": 0.5, "beta": 0.2},
        bad=[{"alpha": 0.0}, {"beta": -1.0}, {"alpha": float("inf")}],
        bad_late=[{"parameters": "no_such_name"}, {"alpha": 1e-3}],
        gradcheck=_arctangent,
    ),
}
