"""Plain techniques that stand beside the one under test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.step import Step
from lightning_reg.engine.update import ParameterUpdate


class ReferencePenalty(Regularizer):
    """The sum of squares of all weights, in the loss.

    Args:
        strength: the multiplier.
        kwargs: see :class:`Regularizer`.
    """

    reads = frozenset({"weights"})
    writes = frozenset({"losses"})

    def __init__(self, strength: float = 0.01, **kwargs: Any) -> None:
        super().__init__(strength, **kwargs)

    def penalty(self, step: Step) -> Tensor:
        """Half the squared norm."""
        squares = [w.square().sum() for w in step.trainable_parameters()]
        return 0.5 * torch.stack(squares).sum()


class ReferenceGradientEdit(Regularizer):
    """Brings the norm of the gradient to one, which adding to gradients does not commute with.

    Args:
        strength: the norm.
        kwargs: see :class:`Regularizer`.
    """

    reads = frozenset({"gradients"})
    writes = frozenset({"gradients"})

    def edit_gradients(self, update: ParameterUpdate) -> None:
        """Rescale all gradients together."""
        weights = update.module.parameters()
        gradients = [w.grad for w in weights if w.grad is not None and update.owns(w)]
        if gradients:
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            scale = update.gradient_scale()
            wanted = update.strength(self) * (1.0 if scale is None else scale)
            torch._foreach_mul_(gradients, wanted / (norm + 1e-12))
