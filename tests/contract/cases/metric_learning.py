"""Contract settings of losses on labeled embeddings."""

import torch

from lightning_reg.techniques.metric_learning.metrix import metrix
from lightning_reg.testing import ContractCase


def _embeddings():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(6, 3, dtype=torch.float64, generator=generator).requires_grad_(),)


def _both_losses(embeddings):
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    one = metrix(embeddings, labels, 0.3)
    return one + metrix(embeddings, labels, 0.3, partner="anchor", loss="multi_similarity")


CASES = {
    "Metrix": ContractCase(
        args={"layer": "encoder", "head": "head", "hardest": 2},
        neutral={"strength": 0.0},
        bad=[
            {"loss": "triplet"},
            {"partner": "negative"},
            {"margin": 0.0},
            {"weight": -1.0},
            {"alpha": 0.0},
            {"hardest": 0},
        ],
        bad_late=[{"layer": "no_such_layer"}, {"head": "no_such_layer"}],
        gradcheck=lambda: (_both_losses, _embeddings()),
    ),
}
