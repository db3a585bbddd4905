"""Pulls every weight to zero in proportion to its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.proximal_penalty import ProximalMode, ProximalPenalty

__all__ = ["L2Penalty", "l2_penalty"]


def l2_penalty(weight: Tensor) -> Tensor:
    """``sum_i w_i^2 / 2``; its gradient is ``w``.

    Args:
        weight: any shape.

    Returns:
        A scalar, at least 0.
    """
    return weight.square().sum() / 2


class L2Penalty(ProximalPenalty):
    """Pulls every weight to zero in proportion to its size (ridge, weight decay).

    Krogh, Hertz (1991), A Simple Weight Decay Can Improve Generalization; Hoerl, Kennard (1970),
    Ridge Regression: Biased Estimation for Nonorthogonal Problems.

    ``R = 1/2 sum_l ||w_l||_2^2``, so that ``strength`` means what ``weight_decay`` means in
    ``torch.optim.SGD``. Beside that argument it has a schedule, a choice of weights without
    parameter groups (biases and normalization layers are left out), a logged value, and its three
    ways of acting under any optimizer: the gradient enters momentum and preconditioner (as the
    ``weight_decay`` of ``Adam`` does), the proximal step ``w <- w / (1 + lr strength)`` does not
    (decoupled, as in ``AdamW`` to first order in ``lr strength``, and stable for any of it).

    The formula is the textbook's. The default strength is ours.

    Args:
        strength: ``lambda``, at least 0.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers.
        mode: ``"gradient"`` adds ``w`` once per optimizer step; ``"loss"`` adds the penalty to the
            loss of every micro-batch; ``"proximal"`` shrinks after the step.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, or if no parameter is chosen.

    Note:
        Over ranks: replica; nothing is communicated. Cost per optimizer step: two passes over the
        weights; under ``ddp_reg`` each rank makes them for its share of the layers, except in the
        proximal mode. Set the optimizer's ``weight_decay`` to 0, or weights decay twice. In front
        of a BatchNorm it changes no function, only the effective learning rate.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import L2Penalty
        >>> trainer = L.Trainer(callbacks=[L2Penalty(1e-4)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("A Simple Weight Decay Can Improve Generalization", "Krogh et al.", 1991, None),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(l2_penalty)
    explanation: ClassVar[str] = "pulls every weight to zero in proportion to its size"
    by_rows = True

    def __init__(
        self,
        strength: float | Schedule = 1e-4,
        *,
        parameters: str | ParameterSelection | None = None,
        mode: ProximalMode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, mode=mode, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="L2Penalty(1e-4)")

    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The penalty of each weight."""
        return torch.stack([l2_penalty(matrix) for matrix in matrices])

    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Half the squared norms, and the weights themselves."""
        return torch.stack(torch._foreach_norm(list(matrices))).square() / 2, list(matrices)

    def gradients(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The weights themselves."""
        return list(matrices)

    def proximal_form(self, matrices: Sequence[Tensor], steps: Sequence[float]) -> list[Tensor]:
        """Weights over one plus the step."""
        return list(torch._foreach_div(list(matrices), [1 + t for t in steps]))
