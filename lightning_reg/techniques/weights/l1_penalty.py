"""Pulls every weight to zero with the same force, which makes weights sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.proximal_penalty import (
    ProximalMode,
    ProximalPenalty,
    soft_threshold,
)

__all__ = ["L1Penalty", "l1_penalty"]


def l1_penalty(weight: Tensor) -> Tensor:
    """``sum_i |w_i|``; its gradient is ``sign(w)``, with 0 at 0.

    Args:
        weight: any shape.

    Returns:
        A scalar, at least 0.
    """
    return weight.abs().sum()


class L1Penalty(ProximalPenalty):
    """Pulls every weight to zero with the same force, which makes weights sparse (the lasso).

    Tibshirani (1996), Regression Shrinkage and Selection via the Lasso.

    ``R = sum_l ||w_l||_1`` over the weights of all layers. A weight whose part in the loss is
    worth less than ``strength`` goes to zero. The (sub)gradient brings it near zero, around which
    it then jumps by ``lr * strength``; the proximal step ``w <- sign(w) max(|w| - lr strength, 0)``
    makes it zero exactly.

    The formula is the textbook's. The default strength is ours.

    Args:
        strength: ``lambda``, at least 0.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers.
        mode: ``"gradient"`` adds ``sign(w)`` once per optimizer step; ``"loss"`` adds the penalty
            to the loss of every micro-batch; ``"proximal"`` soft-thresholds after the step, which
            is what gives exact zeros.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, or if no parameter is chosen.

    Note:
        Over ranks: replica; nothing is communicated. Cost per optimizer step: two passes over the
        weights; under ``ddp_reg`` each rank makes them for its share of the layers, except in the
        proximal mode. The proximal step uses the learning rate of its parameter group, and under
        Adam not the preconditioner. It hurts where many weights carry the same information: of
        those it keeps one, which :class:`ElasticNet` does not.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import L1Penalty
        >>> trainer = L.Trainer(callbacks=[L1Penalty(1e-5, mode="proximal")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Regression Shrinkage and Selection via the Lasso", "Tibshirani", 1996, None),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(l1_penalty)
    explanation: ClassVar[str] = "pulls every weight to zero with the same force"
    by_rows = True

    def __init__(
        self,
        strength: float | Schedule = 1e-5,
        *,
        parameters: str | ParameterSelection | None = None,
        mode: ProximalMode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, mode=mode, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="L1Penalty(1e-5)")

    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The penalty of each weight."""
        return torch.stack([l1_penalty(matrix) for matrix in matrices])

    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Norms and signs."""
        return torch.stack(torch._foreach_norm(list(matrices), 1)), self.gradients(matrices)

    def gradients(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Signs."""
        return list(torch._foreach_sign(list(matrices)))

    def proximal_form(self, matrices: Sequence[Tensor], steps: Sequence[float]) -> list[Tensor]:
        """Soft-thresholded weights."""
        return soft_threshold(matrices, steps)
