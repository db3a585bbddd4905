"""Scores and labels of each class at each position, for losses that look at classes one by one.

What a technique gets from :meth:`ClassScores.positions`: scores, labels and which of them count,
(B, P, C) each, for the P positions of B samples. The mechanism takes care of

- finding logits and labels, in float32 at least, and of their layout: (B, C), (B, T, C),
  (B, C, H, W);
- the task: classes that exclude each other (a softmax), or each for itself (a sigmoid; one class
  is a binary task);
- labels as class indices, as soft labels, and those of a batch that was mixed;
- positions that the labels mark as ignored, and classes that are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.labeled_output_penalty import mixed_labels
from lightning_reg.mechanisms.output_penalty import LogitRows

Task = Literal["multiclass", "multilabel"]
_TASKS = ("multiclass", "multilabel")


def check_choice(owner: object, argument: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ArgumentError(
            owner,
            f"`{argument}` must be one of {', '.join(allowed)}, got {value!r}",
            cure=f'{type(owner).__name__}({argument}="{allowed[0]}")',
        )


class ClassScores(LogitRows):
    """Base of losses on the scores of each class against the rest.

    Args:
        strength: the multiplier, at least 0.
        task: ``"multiclass"``: a softmax over the classes; ``"multilabel"``: a sigmoid for each
            class, also for one, with labels 0 and 1 of the logits' shape (for one class the class
            dimension may be missing).
        classes: the classes that count; ``None`` takes all.
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
        classes: Sequence[int] | None = None,
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
        check_choice(self, "task", task, _TASKS)
        if classes is not None:
            classes = tuple(classes)
            if not classes or not all(type(c) is int and c >= 0 for c in classes):
                problem = f"`classes` must be class indices from 0, got {classes!r}"
                raise ArgumentError(self, problem, cure=f"{kind}(classes=[1, 2])")
        self.task: Task = task
        self.classes = classes

    def chosen(self, tensor: Tensor) -> Tensor:
        """The classes of (..., C) that count."""
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

    def positions(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
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


__all__ = ["ClassScores", "Task", "check_choice"]
