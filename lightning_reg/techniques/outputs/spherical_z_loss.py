"""Replaces the cross-entropy by a loss that neither shift nor scale of the logits changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.criterion import as_distribution
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces

__all__ = ["SphericalZLoss", "spherical_z_loss"]


def spherical_z_loss(
    logits: Tensor, targets: Tensor, a: float = 1.0, b: float | None = None
) -> Tensor:
    """``(1/a) log(1 + exp(a (b - z_y)))`` with the z-scores of each row of logits.

    ``z_c = (o_c - mu) / sigma``, with the mean ``mu`` and the standard deviation ``sigma`` over
    the classes (divided by ``C``, not ``C - 1``), so that ``z_c <= sqrt(C - 1)``. Where all logits
    are equal ``z`` is 0 and has no gradient. Soft labels weight the terms of their classes.

    Args:
        logits: (N, C), finite.
        targets: (N,) class indices, or (N, C) distributions.
        a: above 0, the steepness.
        b: the z-score that is asked for; ``None`` takes the largest, ``sqrt(C - 1)``.

    Returns:
        (N,), above 0.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    spread = variance > 0
    z = centred * torch.where(spread, variance.where(spread, 1.0).rsqrt(), 0.0)
    b = math.sqrt(logits.shape[-1] - 1) if b is None else b
    return (as_distribution(targets, logits) * F.softplus(a * (b - z))).sum(-1) / a


class SphericalZLoss(LossReplacement):
    """Trains the label's z-score among the logits, whose scale then has no say (the Z-loss).

    de Brebisson, Vincent (2016), The Z-loss: a shift and scale invariant classification loss
    belonging to the Spherical Family, arXiv:1604.08859. Not the ``log^2 Z`` penalty of language
    models, which is :class:`PaLMZLoss`.

    ``L = (1/a) softplus(a (b - z_y))`` with ``z_y = (o_y - mu) / sigma``. It depends on the logits
    through ``o_y``, their sum and their sum of squares alone, which makes it spherical. Its
    gradient is orthogonal to the logits: it never makes them grow, while the cross-entropy of a
    fitted sample does so for ever. What counts is how far the label stands out, not by what
    factor it is likelier. The paper's update, whose cost does not grow with the number of
    classes, is not part of this.

    Formula from memory of the paper; no official code was found. ``a`` and ``b`` are tuned there;
    the defaults are ours: ``a = 1``, and for ``b`` the largest z-score that there is,
    ``sqrt(C - 1)``, so that the pull on ``z_y`` never falls below one half.

    Args:
        strength: the share of the new loss, in [0, 1]; the rest stays the cross-entropy.
        a: above 0.
        b: a number, or ``None`` for ``sqrt(C - 1)``.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy, ``"term"`` if that is one
            of its terms, ``"loss"`` to drop whatever it is.
        signals: where ``logits`` and ``targets`` are, if not in the usual places.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.

    Note:
        Over ranks: global; a mean over samples, for which nothing is communicated. Cost: a mean,
        a variance and a softplus over the logits (B, C).

        A softmax of these logits is no probability: calibrate before it is read as one. A head
        that starts at zeros gets no gradient, and logits may not be masked with ``-inf``. Without
        weight decay the step size in effect falls as weights grow, as with BatchNorm.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SphericalZLoss
        >>> trainer = L.Trainer(callbacks=[SphericalZLoss(a=1.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "The Z-loss: a shift and scale invariant classification loss belonging to the "
            "Spherical Family",
            "de Brebisson and Vincent",
            2016,
            "1604.08859",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(spherical_z_loss)
    explanation: ClassVar[str] = "replaces the cross-entropy by a loss of the label's z-score"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        a: float = 1.0,
        b: float | None = None,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        cure = "SphericalZLoss(a=1.0, b=3.0)"
        check_range(self, "a", a, 0, math.inf, low_open=True, high_open=True, cure=cure)
        if b is not None:
            check_range(self, "b", b, -math.inf, math.inf, low_open=True, high_open=True, cure=cure)
        self.a = a
        self.b = b

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss of each row."""
        return spherical_z_loss(logits, distribution, self.a, self.b)
