"""A technique of your own, held to the contract that the package's techniques keep.

Run: ``python examples/own_technique.py`` (a minute; two processes are started for the checks
over ranks).
"""

import sys

import torch
from torch import Tensor

from lightning_reg import Regularizer, Step
from lightning_reg.testing import ContractCase, check_regularizer


def logit_penalty(logits: Tensor) -> Tensor:
    """Half the squared norm of each sample's logits: (B, C) to (B,)."""
    return 0.5 * logits.square().sum(1)


class LogitPenalty(Regularizer):
    """Keeps logits small: adds ``strength * mean_i 1/2 |z_i|^2`` to the loss."""

    semantics = "global"
    needs = ("logits",)
    reads = frozenset({"logits"})
    function = staticmethod(logit_penalty)
    explanation = "keeps logits small"

    def penalty(self, step: Step) -> Tensor:
        return step.comm.mean(logit_penalty(step.logits))


CASE = ContractCase(
    args={"strength": 0.1},
    neutral={"strength": 0.0},
    expected=lambda probe: 0.5 * probe.logits.square().sum() / len(probe.logits),
    gradcheck=lambda: (logit_penalty, (torch.randn(4, 3).double().requires_grad_(),)),
)


def main(*checks: str) -> dict[str, str]:
    return check_regularizer(LogitPenalty, CASE, checks=checks or None)


if __name__ == "__main__":
    for check, outcome in main(*sys.argv[1:]).items():
        print(f"{check:>14}: {outcome}")
