"""Learning from what a layer of a teacher returns.

A technique supplies :meth:`FeatureDistillation.value`: a number from the student's features and
the teacher's. The mechanism takes care of

- the teacher: a given network (see :mod:`~lightning_reg.mechanisms.given_teacher`) or a copy of
  the module (:mod:`~lightning_reg.mechanisms.teacher`);
- the features: the output of ``layer`` in the step, with its graph, and that of ``teacher_layer``
  for the same inputs, without; both in float32 at least;
- positions: (B, d), (B, T, d) and (B, d, H, W) all come as (B, P, d); feature maps of unequal
  size are averaged to the smaller grid.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import lightning.pytorch as pl
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import (
    ArgumentError,
    RegularizationError,
    Schedule,
    Signals,
    Step,
    UnsupportedError,
)
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.feature_penalty import check_layer, positions
from lightning_reg.mechanisms.given_teacher import GivenTeacher
from lightning_reg.mechanisms.teacher import Source


class FeatureDistillation(GivenTeacher):
    """Base of techniques that add ``strength * value(student's features, teacher's features)``.

    Args:
        strength: the multiplier, at least 0.
        layer: the submodule of the student whose output is meant.
        teacher: the network to learn from.
        teacher_layer: the submodule of the teacher; by default ``layer``.
        source: a copy of the module in place of a ``teacher``.
        decay: of the average of ``"ema"``.
        signals: where ``inputs`` and other signals are.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("inputs", "features")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "features"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        layer: str,
        teacher: nn.Module | None = None,
        teacher_layer: str | None = None,
        source: Source | None = None,
        decay: float = 0.999,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, teacher=teacher, source=source, decay=decay, signals=signals, name=name
        )
        for argument, value in (("layer", layer), ("teacher_layer", teacher_layer or layer)):
            if not isinstance(value, str) or not value:
                raise ArgumentError(
                    self,
                    f"`{argument}` must be the name of a submodule, got {value!r}",
                    cure=f'{type(self).__name__}({argument}="encoder", source="reference")',
                )
        self.layer = layer
        self.teacher_layer = teacher_layer or layer

    @property
    def layers(self) -> tuple[str, ...]:
        """The submodules to capture."""
        return (self.layer,)

    @abstractmethod
    def value(self, step: Step, student: Tensor, teacher: Tensor) -> Tensor | JointMean:
        """The penalty.

        Args:
            step: the micro-batch.
            student: (B, P, d), with a graph.
            teacher: (B, P, d'), without.
        """

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse layers that are not there."""
        super().validate(trainer, pl_module)
        check_layer(self, self.layer, pl_module)
        if self.given is not None:
            self._check_teacher(self.given.network)

    def penalty(self, step: Step) -> Tensor | JointMean | None:
        """Phase 4; there is no teacher in the first epoch of ``source="past"``."""
        if self.teacher is None:
            return None
        student = step.feature(self.layer)
        teacher = self.teacher_features(step)
        if student.ndim == teacher.ndim == 4:
            student, teacher = _on_one_grid(student, teacher)
        rows = positions(self, student), positions(self, teacher)
        if rows[0].shape[:2] != rows[1].shape[:2]:
            raise RegularizationError(
                self,
                f"{self.layer!r} returns {tuple(student.shape)}, and {self.teacher_layer!r} of the "
                f"teacher {tuple(teacher.shape)}: they do not have the same positions",
                cure=f'{type(self).__name__}(layer="<a layer>", teacher_layer="<one that fits>")',
            )
        return self.value(step, *rows)

    def teacher_features(self, step: Step) -> Tensor:
        """What the teacher's layer returns for the inputs of the step."""
        assert self.teacher is not None
        calls = self.teacher.outputs_of(self.teacher_layer, step.inputs, step.module)
        if len(calls) != 1 or not isinstance(calls[0], Tensor):
            raise UnsupportedError(
                self,
                f"takes the teacher's features from its `forward`, which has to call "
                f"{self.teacher_layer!r} once for one tensor, and made {len(calls)} calls",
                cure=f'{type(self).__name__}(teacher_layer="<a layer that forward calls once>")',
            )
        return full_precision(calls[0])

    def one_width(self, student: Tensor, teacher: Tensor) -> None:
        """Raise unless both have features of the same width."""
        if student.shape[-1] == teacher.shape[-1]:
            return
        widths = student.shape[-1], teacher.shape[-1]
        raise RegularizationError(
            self,
            f"{self.layer!r} returns {widths[0]} features and the teacher's "
            f"{self.teacher_layer!r} {widths[1]}: compare a layer that maps to the teacher's width",
            cure=f"self.adapter = nn.Linear({widths[0]}, {widths[1]}), called in training_step, "
            f'and {type(self).__name__}(layer="adapter")',
        )

    def _check_teacher(self, network: nn.Module) -> None:
        known = [name for name, _ in network.named_modules() if name]
        if self.teacher_layer not in known:
            raise ArgumentError(
                self,
                f"`teacher_layer` is {self.teacher_layer!r}, which the teacher does not have; it "
                f"has {', '.join(known[:12]) or 'no submodules'}",
                cure=f'{type(self).__name__}(teacher_layer="{known[0] if known else "encoder"}")',
            )


def _on_one_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Feature maps (B, d, H, W), averaged to the smaller height and the smaller width."""
    height, width = (min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    size = (height, width)
    grids = [
        maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size)
        for maps in (student, teacher)
    ]
    return grids[0], grids[1]


__all__ = ["FeatureDistillation"]
