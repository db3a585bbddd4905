"""Trains a network to agree with a randomly initialized one, with no labels at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.distillation import Distillation

__all__ = [
    "RandomTeacherDistillation",
    "interpolated_initialization",
    "random_teacher_distillation",
]


def random_teacher_distillation(
    student: Tensor,
    teacher: Tensor,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> Tensor:
    """``KL(softmax(t / tau_t) || softmax(s / tau_s))`` of each row, in nats.

    Args:
        student: (N, C) outputs ``s``.
        teacher: (N, C) outputs ``t``; no gradient flows.
        teacher_temperature: ``tau_t`` above 0.
        student_temperature: ``tau_s`` above 0.

    Returns:
        (N,), at least 0.
    """
    log_t = F.log_softmax(teacher.detach() / teacher_temperature, dim=-1)
    log_s = F.log_softmax(student / student_temperature, dim=-1)
    p = log_t.exp()
    return (p * (log_t - log_s).masked_fill(p == 0, 0.0)).sum(-1)


def interpolated_initialization(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """``((1 - alpha) theta_T + alpha theta) / sqrt(alpha^2 + (1 - alpha)^2)``.

    The divisor keeps the variance of independent weights.

    Args:
        student: fresh weights ``theta``.
        teacher: those of the teacher, of the same shape.
        alpha: the locality in [0, 1]: 0 gives the teacher, 1 the fresh weights.

    Returns:
        The weights to start with, of the same shape.
    """
    mixed = (1 - alpha) * teacher + alpha * student
    return mixed / math.sqrt(alpha**2 + (1 - alpha) ** 2)


class RandomTeacherDistillation(Distillation):
    """Distills a randomly initialized copy of the network into the network itself.

    Sarnthein, Bachmann, Anagnostidis, Hofmann (2023), Random Teachers are Good Teachers,
    arXiv:2302.12091.

    The student learns ``KL(softmax(t / tau_t) || softmax(s / tau_s))`` on the same inputs, with no
    labels, no augmentation and a teacher that never moves. It learns features that a linear probe
    reads better than the teacher's: what is distilled is not knowledge of the teacher, but what
    gradient descent makes of the data. The closer the student starts to the teacher (``locality``
    ``alpha`` near 0), the stronger the effect; at ``alpha = 0`` it is at the optimum and stays.

    As in the official code (safelix/dinopl: dinopl/core.py, configuration.py): weights start as
    ``((1 - alpha) theta_T + alpha theta) / sqrt(2 alpha^2 - 2 alpha + 1)``, from fresh ``theta``.
    Its configurations use temperatures 0.04 and 0.1, a wide projection head, and the
    cross-entropy, which has the same gradient. The defaults of 1 here are for networks whose
    outputs are as they come; with equal temperatures the loss vanishes where both agree.

    Args:
        strength: the multiplier, at least 0. To learn from the teacher alone, let
            ``training_step`` return ``0.0 * loss``.
        alpha: the locality in [0, 1]; ``None`` leaves the student as its user initialized it.
        teacher_temperature: ``tau_t``, above 0.
        student_temperature: ``tau_s``, above 0.
        signals: where ``inputs`` and ``logits`` (the outputs to compare) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if a number is outside its range.
        UnsupportedError: if the module has no ``forward`` or cannot be copied.

    Note:
        The teacher is drawn by ``reset_parameters`` of the module's parts from a stream of its
        own, the same on all ranks, and is saved with the checkpoint; a resume draws nothing
        again. Parts without ``reset_parameters`` keep the student's weights. Over ranks: global.
        Under accumulation each micro-batch takes its own mean. Cost: a forward pass without
        gradients, and a second copy of the weights.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import RandomTeacherDistillation
        >>> trainer = L.Trainer(callbacks=[RandomTeacherDistillation(alpha=0.2)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Random Teachers are Good Teachers", "Sarnthein et al.", 2023, "2302.12091"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(random_teacher_distillation)
    explanation: ClassVar[str] = "trains to agree with a randomly initialized copy"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        alpha: float | None = None,
        teacher_temperature: float = 1.0,
        student_temperature: float = 1.0,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, source="random", ignore_index=None, signals=signals, name=name)
        cure = "RandomTeacherDistillation(alpha=0.2, teacher_temperature=1.0)"
        if alpha is not None:
            check_range(self, "alpha", alpha, 0, 1, cure=cure)
        for argument, value in (
            ("teacher_temperature", teacher_temperature),
            ("student_temperature", student_temperature),
        ):
            check_range(self, argument, value, 0, low_open=True, cure=cure)
        self.alpha = alpha
        self.teacher_temperature = teacher_temperature
        self.student_temperature = student_temperature

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the teacher, and move the student towards it; not on a resume."""
        begins = self._loaded_teacher is None and int(trainer.global_step) == 0
        super().on_reference(trainer, pl_module)
        if not begins or self.alpha is None or self.strength == 0:
            return
        assert self.teacher is not None
        fresh = pl_module.parameters()
        with torch.no_grad():
            for own, other in zip(fresh, self.teacher.network.parameters(), strict=True):
                # A part that cannot be drawn again is the same in both.
                if not torch.equal(own, other.to(own)):
                    own.copy_(interpolated_initialization(own, other.to(own), self.alpha))

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """The divergence of each row."""
        return random_teacher_distillation(
            student, teacher, self.teacher_temperature, self.student_temperature
        )
