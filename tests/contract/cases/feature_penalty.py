"""Penalties on the representation of a batch."""

import torch

from lightning_reg.techniques.features.von_neumann_entropy import von_neumann_entropy
from lightning_reg.testing import ContractCase


def _features():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)


CASES = {
    "VonNeumannEntropy": ContractCase(
        args={"strength": 0.5, "layer": "encoder"},
        neutral={"strength": 0.0},
        bad=[{"pooling": "max"}, {"layer": ""}, {"feature_dim": 0}],
        bad_late=[{"layer": "no_such_layer"}, {"layer": None}],
        expected=lambda probe: -von_neumann_entropy(probe.features["encoder"]),
        gradcheck=lambda: (von_neumann_entropy, (_features(),)),
    ),
}
