"""Learning from a teacher's predictions: a given network, or a copy of the module itself.

A technique supplies :meth:`Distillation.divergence`: one number per row of the student's and the
teacher's logits. The mechanism takes care of

- the teacher: any network (``teacher``), frozen, in eval mode, on the module's device and in its
  type, no part of the module, its optimizer, its checkpoint or DDP; or a copy of the module
  (``source``; see :mod:`~lightning_reg.mechanisms.teacher`);
- logits (B, C), (B, T, C) or (B, C, H, W), in float32 at least, with ignored positions left out;
- labels as classes (N,) for techniques that look at them (``labelled``); smoothed and mixed labels
  count as their most likely class;
- the mean over all ranks, each row counting once;
- a resume: a given network is not saved, and the run refuses to go on with another one.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.criterion import as_distribution, flatten
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.output_penalty import LogitRows
from lightning_reg.mechanisms.teacher import FrozenNetwork, Source, Teacher


class Distillation(Teacher, LogitRows):
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
            source=source,
            decay=decay,
            ignore_index=ignore_index,
            class_dim=class_dim,
            signals=signals,
            name=name,
        )
        owner = type(self).__name__
        if (teacher is None) == (source is None):
            raise ArgumentError(
                self,
                "needs a `teacher` or a `source`, one of the two",
                cure=f'{owner}(teacher=network), or {owner}(source="ema")',
            )
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise ArgumentError(
                self,
                f"`teacher` must be a torch module, got {type(teacher).__name__}",
                cure=f"{owner}(teacher=network)",
            )
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=f'{owner}(1.0, source="ema")')
        self.given = None if teacher is None else FrozenNetwork(teacher)
        self._loaded_mark: Tensor | None = None

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

    # ------------------------------------------------------------------ the given teacher

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the given network, or make the copy."""
        super().on_reference(trainer, pl_module)
        if self.given is None:
            return
        if self._loaded_mark is not None and not torch.equal(self._loaded_mark, _mark(self.given)):
            raise RegularizationError(
                self,
                "the teacher is not the one of the checkpoint: their weights differ",
                cure="teacher.load_state_dict(...) before the Trainer is made",
            )
        self._loaded_mark = None
        self.teacher = self.given

    def state_dict(self) -> dict[str, Any]:
        """The weights of a copy; of a given network only what tells it from another."""
        if self.given is None:
            return super().state_dict()
        kept, self.teacher = self.teacher, None
        state = super().state_dict()
        self.teacher = kept
        return {**state, "mark": _mark(self.given)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what is needed until training starts."""
        super().load_state_dict(state_dict)
        self._loaded_mark = state_dict.get("mark")

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


def _mark(network: FrozenNetwork) -> Tensor:
    """Sums by which two networks are told apart, whatever device and type they are on."""
    weights = [p.detach().double() for p in network.network.parameters()]
    sums = [torch.stack([w.sum(), w.square().sum()]).cpu() for w in weights]
    return torch.stack(sums) if sums else torch.zeros(0, 2, dtype=torch.float64)


__all__ = ["Distillation"]
