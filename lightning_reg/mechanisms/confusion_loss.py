"""Losses on soft confusion counts: what a prediction shares with the labels, and what not.

A technique supplies :meth:`ConfusionLoss.losses`: a loss from the counts of each class; and may
change what a position adds to them (:meth:`ConfusionLoss.terms`). The mechanism takes care of

- finding logits and labels, in float32 at least, and of their layout: (B, C), (B, T, C),
  (B, C, H, W), with a softmax over classes or a sigmoid for each (one class is a binary task);
- labels as class indices, as soft labels, and those of a batch that was mixed; positions that the
  labels mark as ignored add nothing;
- over what counts are summed: single positions, images, or the batch. Those of a batch are summed
  over all ranks, with gradients, before the loss is taken of them, which is not linear in them;
- which classes count, and whether those do that no label of the region has;
- adding the value to the user's loss, which may be a plain zero of the network
  (``0.0 * logits.sum()``) where this is the only loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.labeled_output_penalty import mixed_labels
from lightning_reg.mechanisms.output_penalty import LogitRows

Task = Literal["multiclass", "multilabel"]
Over = Literal["position", "image", "batch"]
_TASKS = ("multiclass", "multilabel")
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


class ConfusionLoss(LogitRows):
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

    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"logits", "targets"})

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
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        kind = type(self).__name__
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=f"{kind}(strength=1.0)")
        for argument, value, allowed in (("task", task, _TASKS), ("over", over, _OVER)):
            if value not in allowed:
                raise ArgumentError(
                    self,
                    f"`{argument}` must be one of {', '.join(allowed)}, got {value!r}",
                    cure=f'{kind}({argument}="{allowed[0]}")',
                )
        if not isinstance(present_only, bool):
            problem = f"`present_only` must be True or False, got {present_only!r}"
            raise ArgumentError(self, problem, cure=f"{kind}(present_only=True)")
        if classes is not None:
            classes = tuple(classes)
            if not classes or not all(type(c) is int and c >= 0 for c in classes):
                problem = f"`classes` must be class indices from 0, got {classes!r}"
                raise ArgumentError(self, problem, cure=f"{kind}(classes=[1, 2])")
        self.task: Task = task
        self.over: Over = over
        self.classes = classes
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
        scores, labels, kept = self._positions(step)
        p = scores.softmax(-1) if self.task == "multiclass" else scores.sigmoid()
        p, labels, kept = (self._chosen(tensor) for tensor in (p, labels, kept))
        # A position that does not count adds nothing, whatever its logits are.
        p = p.where(kept, torch.zeros_like(p))
        labels = labels * kept
        parts = [*(part * kept for part in self.terms(p, labels)), kept.to(p)]
        if self.over == "batch":
            sums = torch.stack([part.flatten(0, 1).sum(0) for part in parts])
            return self._of_batch(Counts(*step.comm.reduce(sums).unbind(0)))
        if self.over == "image":
            parts = [part.sum(1) for part in parts]
        counts = Counts(*parts)
        return JointMean.of(self.losses(counts).flatten(), self._weights(counts).flatten())

    def _of_batch(self, counts: Counts) -> Tensor:
        weights = self._weights(counts)
        value: Tensor = (self.losses(counts) * weights).sum() / weights.sum().clamp_min(1)
        return value

    def _weights(self, counts: Counts) -> Tensor:
        """1 for the classes and regions that count."""
        counting = counts.labelled if self.present_only else counts.positions
        return (counting.detach() > 0).to(counting)

    # ------------------------------------------------------------------ layout

    def _positions(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and labels (B, P, C), and which of them count (B, P, C)."""
        logits, targets = step.logits, step.targets
        if not isinstance(targets, Tensor):
            raise self._unfit(logits, type(targets).__name__)
        if self.task == "multilabel":
            scores, labels, kept = self._of_each_class(logits, targets)
        else:
            scores, labels, kept = self._of_one_class(logits, targets)
        if step.mixes:
            flat = mixed_labels(self, step, labels.flatten(0, 1))
            labels = flat.view_as(labels)
            for permutation, _ in step.mixes:
                kept = kept & kept[permutation]
        return scores, labels, kept

    def _of_one_class(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if targets.is_floating_point() and targets.shape == logits.shape:
            class_dim = self.class_dim if self.class_dim is not None else 1
            scores, labels = (_flat(t.movedim(class_dim, -1)) for t in (logits, targets))
            return scores, labels.to(scores), torch.ones_like(scores, dtype=torch.bool)
        if targets.is_floating_point():
            raise self._unfit(logits, f"{tuple(targets.shape)} of {targets.dtype}")
        scores = _flat(logits.movedim(self._class_dim(logits, targets), -1))
        if targets.numel() != scores.shape[:2].numel():
            raise self._unfit(logits, str(tuple(targets.shape)))
        if scores.shape[-1] < 2:
            raise RegularizationError(
                self,
                "takes a softmax over the classes, and the logits "
                f"{tuple(logits.shape)} have one of them",
                cure=f'{type(self).__name__}(task="multilabel")',
            )
        index = targets.reshape(scores.shape[:2]).long().unsqueeze(-1)
        kept = torch.ones_like(index, dtype=torch.bool)
        if self.ignore_index is not None:
            kept = index != self.ignore_index
        labels = torch.zeros_like(scores)
        labels.scatter_(-1, index.where(kept, 0), 1.0)
        return scores, labels, kept.expand_as(scores)

    def _of_each_class(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if logits.ndim == 1:
            logits = logits.unsqueeze(1)
        class_dim = self.class_dim if self.class_dim is not None else 1
        one = logits.shape[class_dim] == 1 and targets.numel() == logits.numel()
        if targets.shape != logits.shape and not one:
            raise self._unfit(logits, str(tuple(targets.shape)))
        scores, given = (_flat(t.movedim(class_dim, -1)) for t in (logits, targets.view_as(logits)))
        kept = torch.ones_like(scores, dtype=torch.bool)
        if self.ignore_index is not None and not given.is_floating_point():
            kept = given != self.ignore_index
        return scores, given.to(scores), kept

    def _chosen(self, tensor: Tensor) -> Tensor:
        if self.classes is None:
            return tensor
        if max(self.classes) >= tensor.shape[-1]:
            raise ArgumentError(
                self,
                f"`classes` names {max(self.classes)}, and the logits have {tensor.shape[-1]} "
                "classes",
                cure=f"{type(self).__name__}(classes=[0])",
            )
        return tensor[..., list(self.classes)]

    def _unfit(self, logits: Tensor, targets: str) -> RegularizationError:
        return RegularizationError(
            self,
            f"logits {tuple(logits.shape)} and targets {targets} are not those of one "
            f"{self.task} task",
            cure=f'{type(self).__name__}(task="multilabel"), or '
            'signals=Signals(logits="module.<name>", targets="batch.<key>")',
        )


def _flat(classes_last: Tensor) -> Tensor:
    """(B, P, C) of (B, ..., C)."""
    return classes_last.reshape(len(classes_last), -1, classes_last.shape[-1])


__all__ = ["ConfusionLoss", "Counts", "Over", "Task"]
