"""Losses on soft confusion counts: what a prediction shares with the labels, and what not.

A technique supplies :meth:`ConfusionLoss.losses`: a loss from the counts of each class; and may
change what a position adds to them (:meth:`ConfusionLoss.terms`). The mechanism takes care of

- everything that :class:`ClassScores` takes care of, and probabilities from the scores;
- over what counts are summed: single positions, images, or the batch. Those of a batch are summed
  over all ranks, with gradients, before the loss is taken of them, which is not linear in them;
- which classes are averaged, and whether those are that no label of the region has;
- adding the value to the user's loss, which may be a plain zero of the network
  (``0.0 * logits.sum()``) where this is the only loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_reg.engine import Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.mechanisms.class_scores import ClassScores, Task, check_choice

Over = Literal["position", "image", "batch"]
_OVER = ("position", "image", "batch")


@dataclass(frozen=True)
class Counts:
    """Sums over the positions of a region, (..., C) each.

    Attributes:
        both: of ``p y``, the soft true positives.
        predicted: of ``p``.
        labelled: of ``y``.
        positions: how many positions there are.
    """

    both: Tensor
    predicted: Tensor
    labelled: Tensor
    positions: Tensor

    @classmethod
    def of(cls, both: Tensor, predicted: Tensor, labelled: Tensor) -> Counts:
        """The counts (C,) of what rows (N, C) of positions add to them."""
        parts = (both, predicted, labelled, torch.ones_like(labelled))
        return cls(*(part.sum(0) for part in parts))


class ConfusionLoss(ClassScores):
    """Base of losses on soft confusion counts.

    Args:
        strength: the multiplier, at least 0.
        task: ``"multiclass"``: a softmax over the classes; ``"multilabel"``: a sigmoid for each
            class, also for one, with labels 0 and 1 of the logits' shape (for one class the class
            dimension may be missing).
        over: over what counts are summed: each ``"position"`` for itself, each ``"image"``
            (sample), or the ``"batch"`` of all ranks.
        classes: the classes whose losses are averaged; ``None`` takes all. Leave the background
            out with ``classes=[1, 2]``.
        present_only: leave classes out where no label of the region has them.
        ignore_index: positions with this integer label do not count; ``None`` keeps all.
        class_dim: where the classes lie in logits of more than two dimensions. By default it
            follows from the shape of the labels.
        signals: where logits and labels are, if not in the usual places.
        name: the name in logs and checkpoints.
    """

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        task: Task = "multiclass",
        over: Over = "image",
        classes: Sequence[int] | None = None,
        present_only: bool = False,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            task=task,
            classes=classes,
            ignore_index=ignore_index,
            class_dim=class_dim,
            signals=signals,
            name=name,
        )
        check_choice(self, "over", over, _OVER)
        if not isinstance(present_only, bool):
            problem = f"`present_only` must be True or False, got {present_only!r}"
            raise ArgumentError(self, problem, cure=f"{type(self).__name__}(present_only=True)")
        self.over: Over = over
        self.present_only = present_only

    # ------------------------------------------------------------------ what a technique supplies

    @abstractmethod
    def losses(self, counts: Counts) -> Tensor:
        """The loss (..., C) of each class, from its counts in each region."""

    def terms(self, probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each position adds to ``both``, ``predicted`` and ``labelled``.

        Args:
            probabilities: (B, P, C) of the P positions of each sample.
            labels: (B, P, C), 0 and 1, or between them.
        """
        return probabilities * labels, probabilities, labels

    # ------------------------------------------------------------------ phases

    def penalty(self, step: Step) -> Tensor | JointMean:
        """Phase 4."""
        scores, labels, kept = self.positions(step)
        p = scores.softmax(-1) if self.task == "multiclass" else scores.sigmoid()
        p, labels, kept = (self.chosen(tensor) for tensor in (p, labels, kept))
        parts = [*(part * kept for part in self.terms(p, labels)), kept.to(p)]
        if self.over == "batch":
            sums = torch.stack([part.flatten(0, 1).sum(0) for part in parts])
            return self._of_batch(Counts(*step.comm.reduce(sums).unbind(0)))
        if self.over == "image":
            parts = [part.sum(1) for part in parts]
        counts = Counts(*parts)
        weights = self._weights(counts).flatten()
        return JointMean.of(self.losses(counts).flatten(), weights, fixed=True)

    def _of_batch(self, counts: Counts) -> Tensor:
        weights = self._weights(counts)
        value: Tensor = (self.losses(counts) * weights).sum() / weights.sum().clamp_min(1)
        return value

    def _weights(self, counts: Counts) -> Tensor:
        """1 for the classes and regions that count."""
        counting = counts.labelled if self.present_only else counts.positions
        return (counting.detach() > 0).to(counting)


__all__ = ["ConfusionLoss", "Counts", "Over"]
