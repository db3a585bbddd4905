"""Learning from a teacher's predictions: a given network, or a copy of the module itself.

A technique supplies :meth:`Distillation.divergence`: one number per row of the student's and the
teacher's logits. The mechanism takes care of

- the teacher: any network (``teacher``; see :mod:`~lightning_reg.mechanisms.given_teacher`), or a
  copy of the module (``source``; see :mod:`~lightning_reg.mechanisms.teacher`);
- logits (B, C), (B, T, C) or (B, C, H, W), in float32 at least, with ignored positions left out;
- labels as classes (N,) for techniques that look at them (``labelled``); smoothed and mixed labels
  count as their most likely class;
- the mean over all ranks, each row counting once.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine import RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.criterion import as_distribution, flatten
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.given_teacher import GivenTeacher
from lightning_reg.mechanisms.output_penalty import LogitRows
from lightning_reg.mechanisms.teacher import Source


class Distillation(GivenTeacher, LogitRows):
    """Base of techniques that add ``strength * mean_n d(student_n, teacher_n)``.

    Args:
        strength: the multiplier.
        teacher: the network to learn from; called with the inputs of the step, it returns logits.
        source: a copy of the module in place of a ``teacher``: ``"ema"``, ``"past"``,
            ``"reference"`` or ``"random"``.
        decay: of the average of ``"ema"``.
        ignore_index: positions with this integer label are left out; ``None`` keeps all.
        class_dim: where the classes lie in logits of more than two dimensions. By default it
            follows from the shape of the labels.
        signals: where ``inputs``, ``logits`` and ``targets`` are, if not in the usual places.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits"})
    labelled: ClassVar[bool] = False

    def __init__(
        self,
        strength: float | Schedule,
        *,
        teacher: nn.Module | None = None,
        source: Source | None = None,
        decay: float = 0.999,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            teacher=teacher,
            source=source,
            decay=decay,
            ignore_index=ignore_index,
            class_dim=class_dim,
            signals=signals,
            name=name,
        )

    @abstractmethod
    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """The loss (N,) of each row.

        Args:
            student: (N, C), with a graph.
            teacher: (N, C), without.
            labels: (N,) classes, for techniques that are ``labelled``.
        """

    def joint_mean(self, step: Step, values: Tensor) -> JointMean | Tensor:
        """The mean over the rows of all ranks."""
        return JointMean.of(values)

    def penalty(self, step: Step) -> JointMean | Tensor | None:
        """Phase 4; there is no teacher in the first epoch of ``source="past"``."""
        if self.teacher is None:
            return None
        targets = step.find("targets")
        student = self._rows(step.logits, targets)
        teacher = self._rows(self._answer(self.teacher, step.inputs, step.module), targets)
        if student.shape != teacher.shape:
            raise RegularizationError(
                self,
                f"the teacher answers {len(teacher)} rows of {teacher.shape[1]} classes, and the "
                f"logits of {step.hook} are {len(student)} rows of {student.shape[1]}",
                cure="a teacher whose `forward` returns logits for the student's classes",
            )
        labels = self._labels(step, student) if self.labelled else None
        return self.joint_mean(step, self.divergence(student, teacher, labels))

    # ------------------------------------------------------------------ internals

    def _labels(self, step: Step, student: Tensor) -> Tensor:
        distribution = step.target_distribution
        if distribution is None:
            logits, targets = flatten(step.logits, torch.as_tensor(step.targets))
            distribution = as_distribution(targets, logits)
        if distribution.shape != student.shape:
            raise RegularizationError(
                self,
                f"needs one label for each of {len(student)} rows of logits, got labels for "
                f"{len(distribution)}",
                cure='signals=Signals(logits="module.<name>", targets="batch.<key>")',
            )
        return distribution.argmax(1)


__all__ = ["Distillation"]
