"""The loss of steps that were taken already at other weights, while their graph waits.

For techniques that try a step before the optimizer makes it. Weights come back bit for bit, after
an exception too (call :meth:`TrialWeights.write_back` in ``on_fit_close``), and the graph that is
to be differentiated afterwards does not notice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_reg.engine import Step


class TrialWeights:
    """Weights that are moved for a forward pass."""

    def __init__(self) -> None:
        self._moved: list[Tensor] = []
        self._saved: list[Tensor] = []

    def loss(
        self,
        window: Sequence[Step],
        weights: Sequence[Tensor],
        direction: Sequence[Tensor],
        length: float,
    ) -> Tensor:
        """The joint loss of a window of micro-batches at ``weights + length * direction``."""
        self._saved = [w.detach().clone() for w in weights]
        # `.data` has a version of its own: the graph sees the old weights again, and must not
        # refuse them because they were away.
        self._moved = [w.data for w in weights]
        torch._foreach_add_(self._moved, list(direction), alpha=length)
        try:
            losses = [step.rerun().detach() for step in window]
        finally:
            self.write_back()
        return joint_loss(window[-1], losses)

    def write_back(self) -> None:
        """The saved weights, if any are away."""
        if self._moved:
            torch._foreach_copy_(self._moved, self._saved)
        self._moved, self._saved = [], []


def joint_loss(step: Step, losses: Sequence[Tensor]) -> Tensor:
    """The mean over a window's micro-batches and all ranks, in float64.

    Args:
        step: the window's last micro-batch.
        losses: of this rank's micro-batches.
    """
    mean = torch.stack(list(losses)).double().sum() / step.trainer.accumulate_grad_batches
    return step.comm.reduce(mean, "mean")


__all__ = ["TrialWeights", "joint_loss"]
