"""Edits of the gradients that an optimizer is about to use.

A technique supplies :meth:`GradientTransform.transform`: new gradients from weights and gradients.
The mechanism takes care of

- which gradients: of the chosen weights that this optimizer owns and that the loss has reached;
- the moment: once per optimizer step, summed over micro-batches, reduced over ranks, before
  Lightning clips them;
- AMP: gradients come without the loss scale, also where a fused optimizer unscales later;
- half precision: the technique computes in float32;
- weights that FSDP2 shards: the technique sees whole weights and gradients, which every rank holds
  all at the same time; choose fewer where memory is short;
- a strength below 1, which makes that share of the change;
- sparse gradients, which are refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import ParameterSelection, ParameterUpdate, Schedule
from lightning_reg.engine.sharding import wholes, write
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.selected_weights import (
    SelectedWeights,
    check_share,
    dense_gradients,
)


class GradientTransform(SelectedWeights):
    """Base of techniques that replace gradients.

    Args:
        strength: the share of the change that is made, in [0, 1].
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            ``None`` takes the weights of all linear and convolutional layers.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "replica"
    sharded: ClassVar[bool | None] = True
    reads: ClassVar[frozenset[str]] = frozenset({"gradients", "weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        check_share(self, strength)

    @abstractmethod
    def transform(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """New gradients, and a value for the log.

        Args:
            weights: the weights, not to be changed.
            gradients: their gradients, not to be changed.
        """

    def edit_gradients(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 7."""
        weights, gradients = dense_gradients(self, update.trainable(self.selected(update)))
        if not weights:
            return None
        scale = update.gradient_scale()
        full = [full_precision(g) for g in wholes(gradients)]
        if scale is not None:
            full = list(torch._foreach_div(full, scale))
        changed, value = self.transform(
            [full_precision(w) for w in wholes(list(weights.values()))], full
        )
        share = update.strength(self)
        if share != 1:
            changed = list(torch._foreach_lerp(full, changed, share))
        if scale is not None:
            changed = list(torch._foreach_mul(changed, scale))
        write(gradients, changed)
        return value


def radial_parts(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """``<w, g> / <w, w> w``: the part of each gradient along its weight; 0 for a weight of zeros.

    Args:
        weights: tensors ``w``, each taken as one vector.
        gradients: tensors ``g`` of the same shapes.
    """
    coefficients = [_coefficient(w, g) for w, g in zip(weights, gradients, strict=True)]
    return list(torch._foreach_mul(list(weights), coefficients))


def _coefficient(weight: Tensor, gradient: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    square = torch.dot(flat, flat)
    product = torch.dot(flat, gradient.reshape(-1))
    return torch.where(square > 0, product / square, 0.0)


__all__ = ["GradientTransform", "radial_parts"]
