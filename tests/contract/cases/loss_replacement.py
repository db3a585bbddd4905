"""Losses that replace the cross-entropy."""

import torch

from lightning_reg.techniques.noisy_labels.ldr_loss import adaptive_lambda, aldr_loss, ldr_loss
from lightning_reg.testing import ContractCase

_SCORES = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
_LABELS = torch.tensor([0, 1, 2, 3, 1])


def _one_hot(labels, like):
    return torch.nn.functional.one_hot(labels, like.shape[1]).to(like)


def _ldr(probe):
    return ldr_loss(probe.logits, _one_hot(probe.targets, probe.logits), 2.0, 1.0).mean()


def _aldr(probe):
    scores = probe.logits / probe.logits.abs().mean(1, keepdim=True)
    lam = adaptive_lambda(scores, torch.ones(len(scores)).to(scores), 1.0, 1.5)
    return aldr_loss(scores, _one_hot(probe.targets, scores), lam, 1.0, 1.5, 1.0).mean()


def _function(loss, *settings):
    scores = _SCORES.clone().requires_grad_()
    return lambda s: loss(s, _one_hot(_LABELS, s), *settings), (scores,)


CASES = {
    "LDRLoss": ContractCase(
        args={"lam": 2.0, "margin": 1.0, "normalization": "none"},
        neutral={"strength": 0.0},
        bad=[
            {"lam": -1.0},
            {"margin": -1.0},
            {"normalization": "l2"},
            {"replaces": "all"},
            {"strength": 1.5},
        ],
        expected=_ldr,
        gradcheck=lambda: _function(ldr_loss, 2.0, 1.0),
        logs=("reg/ldr_loss",),
    ),
    "ALDRLoss": ContractCase(
        args={"alpha": 1.5, "margin": 1.0},
        neutral={"strength": 0.0},
        bad=[
            {"lam": 0.0},
            {"alpha": 1.0},
            {"iterations": 0},
            {"margin": -1.0},
            {"normalization": "l2"},
            {"num_samples": 0},
            {"strength": -1.0},
        ],
        expected=_aldr,
        gradcheck=lambda: _function(
            aldr_loss, torch.linspace(0.5, 1.0, 5, dtype=torch.float64), 1.0, 2.0, 1.0
        ),
        logs=("reg/aldr_loss", "reg/aldr_loss_lambda"),
    ),
}
