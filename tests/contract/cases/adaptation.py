"""Techniques that adapt in a test."""

from dataclasses import replace

import torch

from lightning_reg.techniques.adaptation.eata import eata
from lightning_reg.techniques.adaptation.tent import tent
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ClassifierHost


def host_with_norm(options):
    """The classifier with its BatchNorm, without which there is nothing to adapt."""
    return ClassifierHost(replace(options, batch_norm=True))


def _logits():
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


_KEEPING = {"entropy_threshold": 3.0, "cosine_threshold": 1.0, "lr": 0.1}


CASES = {
    "Tent": ContractCase(
        args={"lr": 0.1},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"lr": -0.1}, {"steps": 0}, {"stages": ["fit"]}],
        host=host_with_norm,
        stage="test",
        expected=lambda p: tent(p.logits).mean(),
        gradcheck=lambda: (tent, (_logits().requires_grad_(),)),
        logs=("reg/tent", "reg/tent_kept"),
    ),
    "EATA": ContractCase(
        # A loader cannot be written to YAML: the Fisher information has tests of its own.
        args={"fisher_strength": 0.0, **_KEEPING},
        neutral={"strength": 0.0},
        bad=[
            {"fisher_strength": 5.0},
            {"entropy_threshold": 0.0},
            {"cosine_threshold": 1.5},
            {"fisher_strength": -1.0},
        ],
        host=host_with_norm,
        stage="test",
        expected=lambda p: eata(p.logits, None, 3.0, 1.0)[0].mean(),
        # With the gradient stopped in the weights, the loss itself has no finite differences.
        gradcheck=lambda: (_entropy_of_eata, (_logits().requires_grad_(),)),
        logs=("reg/eata", "reg/eata_kept"),
    ),
}


def _entropy_of_eata(logits):
    losses = eata(logits, None, 3.0)[0]
    return losses / (losses / tent(logits)).detach()
