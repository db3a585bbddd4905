"""Losses that know how often each class occurs in the training set.

A technique supplies :meth:`~lightning_reg.mechanisms.loss_replacement.LossReplacement.losses` and
reads :meth:`ClassFrequencyLoss.counts`. The mechanism takes care of

- the counts: given by the user, refused early if they cannot be any;
- their number, which has to be that of the logits, and their device and type;
- everything that a :class:`LossReplacement` takes care of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, RegularizationError, Schedule, Signals
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces


def effective_number_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """``(1 - beta) / (1 - beta^n_c)`` of each class, scaled to a mean of 1.

    Args:
        counts: (C,) ``n_c`` above 0.
        beta: in [0, 1): 0 weights all classes alike, near 1 by ``1 / n_c``.

    Returns:
        (C,).
    """
    weights = (1 - beta) / (1 - beta ** counts.double())
    return (weights / weights.mean()).to(counts.dtype)


class ClassFrequencyLoss(LossReplacement):
    """Base of losses for class-imbalanced training sets.

    Args:
        strength: the share of the new loss, in [0, 1].
        class_counts: how many training samples each class has (``torch.bincount(labels)``), or
            numbers in proportion to that.
        replaces: what of the user's loss goes: ``"cross_entropy"``, ``"term"`` or ``"loss"``.
        signals: where logits and labels are, if not in the usual places.
        name: the name in logs and checkpoints.
    """

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        class_counts: Sequence[float],
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        self.class_counts = _checked(self, class_counts)

    def counts(self, logits: Tensor) -> Tensor:
        """(C,) the counts, where the logits (N, C) are and in their type.

        Raises:
            RegularizationError: if the logits have another number of classes.
        """
        if logits.shape[-1] != len(self.class_counts):
            raise RegularizationError(
                self,
                f"was told of {len(self.class_counts)} classes, and the logits have "
                f"{logits.shape[-1]}",
                cure="class_counts=torch.bincount(labels, minlength=num_classes).tolist()",
            )
        return torch.tensor(self.class_counts, dtype=logits.dtype, device=logits.device)


def _checked(owner: object, counts: Any) -> list[float]:
    values = counts.tolist() if isinstance(counts, Tensor) else counts
    good = isinstance(values, (list, tuple)) and len(values) > 1 and all(map(_positive, values))
    if not good:
        raise ArgumentError(
            owner,
            f"`class_counts` must be a number above 0 for each of two classes or more, got "
            f"{counts!r}",
            cure=f"{type(owner).__name__}(class_counts=torch.bincount(labels).tolist())",
        )
    return [float(value) for value in values]


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


__all__ = ["ClassFrequencyLoss", "effective_number_weights"]
