"""Penalties with a kink: their subgradient, or the proximal step that makes exact zeros.

A technique supplies, over a list of matrices (one a weight, one row an output unit), what a
:class:`WeightPenalty` supplies and :meth:`ProximalPenalty.proximal_form`. The mechanism takes care
of what :class:`WeightPenalty` and :class:`ProximalStep` take care of, and of the choice between
them: ``mode="gradient"`` and ``mode="loss"`` follow the (sub)gradient, under which weights come
near zero and stay there moving; ``mode="proximal"`` steps after the optimizer, under which they
become zero and stay zero.

The proximal step is Euclidean: under Adam it leaves out the preconditioner, as AdamW's decay does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine.errors import RegularizationError
from lightning_reg.mechanisms.projection import ProximalStep
from lightning_reg.mechanisms.weight_penalty import WeightPenalty, as_matrices, as_weights

ProximalMode = Literal["gradient", "loss", "proximal"]
_PROXIMAL_PHASES = ("edit_gradients", "project")


class ProximalPenalty(WeightPenalty, ProximalStep):
    """Base of penalties that also act by ``w <- prox(w)``.

    Args:
        strength: the multiplier.
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            ``None`` takes the weights of all linear and convolutional layers.
        mode: ``"gradient"`` adds the closed-form gradient once per optimizer step; ``"loss"``
            adds the value to the loss of every micro-batch; ``"proximal"`` steps to
            ``argmin_u |u - w|^2 / 2 + lr * strength * R(u)`` after every optimizer step.
        name: the name in logs and checkpoints.
    """

    writes: ClassVar[frozenset[str]] = frozenset({"gradients", "weights"})
    modes: ClassVar[tuple[str, ...]] = ("gradient", "loss", "proximal")

    @abstractmethod
    def proximal_form(self, matrices: Sequence[Tensor], steps: Sequence[float]) -> list[Tensor]:
        """``argmin_u |u - w|^2 / 2 + t R(u)`` of each matrix ``w`` with its step ``t``."""

    def acts_in(self, phase: str) -> bool:
        """Either as a penalty or as a step."""
        if self.mode == "proximal" or phase in _PROXIMAL_PHASES:
            return self.mode == "proximal" and phase in _PROXIMAL_PHASES
        return super().acts_in(phase)

    def proximal(
        self, weights: Mapping[str, Tensor], steps: list[float]
    ) -> tuple[list[Tensor], Tensor | None]:
        """The weights after the step, and the penalty before it."""
        if self.pipeline is None:
            raise RegularizationError(self, "steps only while a fit is under way")
        module = self.pipeline.module
        matrices = as_matrices(module, weights)
        moved = self.proximal_form(matrices, steps)
        return as_weights(module, weights, moved), self.values(matrices).sum()


def soft_threshold(tensors: Sequence[Tensor], thresholds: Sequence[float]) -> list[Tensor]:
    """``sign(w) max(|w| - t, 0)`` of each tensor: the proximal step of ``t ||w||_1``."""
    held = torch._foreach_clamp_max(list(tensors), list(thresholds))
    torch._foreach_clamp_min_(held, [-t for t in thresholds])
    return list(torch._foreach_sub(list(tensors), held))


__all__ = ["ProximalMode", "ProximalPenalty", "soft_threshold"]
