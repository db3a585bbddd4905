"""Mixout."""

import torch

from lightning_reg.techniques.noise.mixout import mixout
from lightning_reg.testing import ContractCase


def _mixout():
    generator = torch.Generator().manual_seed(0)
    weight, reference = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    inputs = (weight.requires_grad_(), reference.requires_grad_())
    return lambda w, r: mixout(w, r, mask, 0.4), inputs


CASES = {
    "Mixout": ContractCase(
        args={"p": 0.5},
        neutral={"p": 0.0},
        bad=[{"p": 1.0}, {"p": -0.1}, {"p": float("nan")}, {"mask": "row"}],
        bad_late=[{"parameters": "no_such_name"}],
        gradcheck=_mixout,
    ),
}
