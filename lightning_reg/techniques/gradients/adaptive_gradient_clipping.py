"""Clips the gradient of every unit relative to the size of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.gradient_transform import GradientTransform
from lightning_reg.mechanisms.selected_weights import EVERYTHING

__all__ = ["AdaptiveGradientClipping", "adaptive_gradient_clipping"]


def adaptive_gradient_clipping(
    weight: Tensor, gradient: Tensor, clip: float = 0.01, eps: float = 1e-3
) -> Tensor:
    """``g_i <- g_i min(1, c max(||w_i||, eps) / ||g_i||)`` for every unit ``i``.

    A unit is a row of a weight of two or more dimensions, with everything behind the first; a
    vector or a number is one unit as a whole.

    Args:
        weight: ``w``, any shape.
        gradient: ``g``, of the same shape.
        clip: ``c``, above 0.
        eps: the least norm that a unit counts with, so that new units at zero can move.

    Returns:
        The new gradient, of the same shape.
    """
    factor = _factor(_unit_norm(weight), _unit_norm(gradient), clip, eps)
    return gradient * factor


class AdaptiveGradientClipping(GradientTransform):
    """Clips the gradient of every unit relative to the size of its weights (AGC).

    Brock, De, Smith, Simonyan (2021), High-Performance Large-Scale Image Recognition Without
    Normalization, arXiv:2102.06171.

    ``g_i <- c max(||w_i||, eps) / ||g_i|| g_i`` where ``||g_i|| / max(||w_i||, eps) > c``, for each
    row ``i`` of a weight; biases, gains and other vectors as a whole. A step can change no unit by
    more than the share ``lr c`` of itself, whatever the scale of the loss: what lets networks
    without normalization train at large batches, and one spike not undo a run.

    Rows, vectors and the two constants are those of timm (utils/agc.py) and of the authors' code,
    from memory; not checked against code. The defaults are the paper's, where ``c`` depends on the
    batch size: 0.01 for large ones, larger for small.

    Args:
        strength: the share of the change that is made, in [0, 1].
        clip: ``c``, above 0.
        eps: the least norm that a unit counts with, above 0.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes every parameter. The paper leaves out the last linear layer:
            ``ParameterSelection(types=["Module"], min_ndim=0, parameter=None, exclude="head")``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], ``clip`` or ``eps`` is not above 0, or no
            parameter is chosen.

    Note:
        Over ranks: replica; it clips the reduced gradients, and nothing is communicated. Once per
        optimizer step. Cost: two norms a unit and a pass over gradients. The log shows the share
        of units that were clipped. Lightning's ``gradient_clip_val`` clips afterwards, by the norm
        of all gradients. Under Adam, whose step does not depend on the gradient's scale, it only
        bounds spikes.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AdaptiveGradientClipping
        >>> trainer = L.Trainer(callbacks=[AdaptiveGradientClipping(clip=0.01)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "High-Performance Large-Scale Image Recognition Without Normalization",
            "Brock et al.",
            2021,
            "2102.06171",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(adaptive_gradient_clipping)
    explanation: ClassVar[str] = "clips each unit's gradient relative to its weights"
    default_selection = EVERYTHING

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        clip: float = 0.01,
        eps: float = 1e-3,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        for letter, value in (("clip", clip), ("eps", eps)):
            cure = f"AdaptiveGradientClipping({letter}=0.01)"
            check_range(self, letter, value, 0, math.inf, low_open=True, high_open=True, cure=cure)
        self.clip = clip
        self.eps = eps

    def transform(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Clipped gradients, and the share of units that were clipped."""
        factors = [
            _factor(_unit_norm(w), _unit_norm(g), self.clip, self.eps)
            for w, g in zip(weights, gradients, strict=True)
        ]
        clipped = torch.cat([factor.flatten() < 1 for factor in factors])
        return list(torch._foreach_mul(list(gradients), factors)), clipped.float().mean()


def _unit_norm(tensor: Tensor) -> Tensor:
    """(out, 1, ...), or a single number for a vector."""
    places = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=places, keepdim=tensor.ndim > 1)
    return norm


def _factor(weight_norm: Tensor, gradient_norm: Tensor, clip: float, eps: float) -> Tensor:
    # A gradient of zeros gives a quotient of infinity, which is no less than 1.
    return (clip * weight_norm.clamp_min(eps) / gradient_norm).clamp_max(1.0)
