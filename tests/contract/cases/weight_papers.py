"""Penalties on weights from papers."""

import torch

from lightning_reg.techniques.weights.group_sparse_envelope import group_sparse_envelope
from lightning_reg.testing import ContractCase, ImageHost

NEUTRAL = {"strength": 0.0}
NOWHERE = [{"parameters": "no_such_name"}]


def _matrix(rows=5, columns=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator).requires_grad_()


CASES = {
    "GroupSparseEnvelope": ContractCase(
        args={"strength": 0.2, "k": 2, "groups": "columns"},
        neutral=NEUTRAL,
        bad=[{"strength": -1.0}, {"k": 0}, {"k": 1.5}, {"groups": "layers"}, {"finish": 2.0}],
        bad_late=NOWHERE,
        host=ImageHost,
        gradcheck=lambda: (lambda w: group_sparse_envelope(w, 2), (_matrix(),)),
    ),
}
