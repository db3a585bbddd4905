"""Training at other widths."""

import torch

from lightning_reg.techniques.reparameterization.mu_parametrization import mu_parametrization
from lightning_reg.testing import ContractCase

OWN = {
    "encoder.0.weight": [16, 8],
    "encoder.0.bias": [16],
    "head.weight": [4, 16],
    "head.bias": [4],
}
NARROW = {**OWN, "encoder.0.weight": [2, 8], "encoder.0.bias": [2], "head.weight": [4, 2]}


def _scaled():
    v = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    return mu_parametrization, (v, 2.0, 5.0)


CASES = {
    "MuParametrization": ContractCase(
        args={"base_shapes": NARROW, "optimizer": "sgd"},
        neutral={"base_shapes": OWN},
        bad=[{"optimizer": "lbfgs"}, {"base_shapes": {**OWN, "head.bias": [0]}}],
        bad_late=[
            {"base_shapes": {}},
            {"base_shapes": {**OWN, "no_such_name": [2]}},
            {"base_shapes": {**OWN, "head.bias": [4, 1]}},
        ],
        gradcheck=_scaled,
    ),
}
