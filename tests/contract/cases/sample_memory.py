"""Techniques that remember samples."""

import torch

from lightning_reg.techniques.noisy_labels.early_learning import early_learning
from lightning_reg.testing import ContractCase


def _expected(probe):
    p = probe.logits.detach().softmax(1).clamp(1e-4, 1 - 1e-4)
    return early_learning(probe.logits, 0.3 * p / p.sum(1, keepdim=True)).mean()


def _function():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    targets = 0.9 * torch.rand(5, 4, dtype=torch.float64, generator=generator).softmax(1)
    return early_learning, (logits, targets)


CASES = {
    "EarlyLearning": ContractCase(
        args={"strength": 3.0, "beta": 0.7},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"beta": 1.0},
            {"beta": -0.1},
            {"num_classes": 0},
            {"num_samples": 1.5},
        ],
        expected=_expected,
        gradcheck=_function,
    ),
}
