"""Keeps how a network relates its inputs to the classes that it was taught before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.criterion import soft_cross_entropy
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.distillation import Distillation
from lightning_reg.mechanisms.teacher import Source

__all__ = ["ClassRelationDistillation", "class_relation_distillation"]


def class_relation_distillation(
    student: Tensor, teacher: Tensor, known: int, temperature: float = 0.15
) -> tuple[Tensor, Tensor]:
    """``T^2 CE(p_t, p_s)`` over the known classes, and the gate ``w``, of each row.

    ``p_t = softmax(t[:K] / T)``, ``p_s = softmax(s[:K] / T)``, and
    ``w = sum_{k < K} softmax(s / T)_k``, the student's belief that the class is a known one. The
    loss of a batch is ``sum_i w_i CE_i / sum_i w_i``.

    Args:
        student: (N, C) logits ``s`` of known and novel classes.
        teacher: (N, K) or (N, C) logits ``t``; no gradient flows.
        known: ``K``, the number of known classes, which are the first.
        temperature: ``T`` above 0.

    Returns:
        Two tensors (N,): the cross-entropies in nats, and the gates in (0, 1], both with
        gradients.
    """
    soft = (teacher.detach()[:, :known] / temperature).softmax(-1)
    losses = temperature**2 * soft_cross_entropy(student[:, :known] / temperature, soft)
    gate = (student / temperature).softmax(-1)[:, :known].sum(-1)
    return losses, gate


class ClassRelationDistillation(Distillation):
    """Distills the known classes' head on samples of novel ones, where it has something to say.

    Gu, Zhang, Xu, He (2023), Class-relation Knowledge Distillation for Novel Class Discovery,
    arXiv:2307.09158.

    A network that was taught ``K`` classes places a sample of a new class among them: a new kind
    of truck is more like a car than like a cat. While the joint head learns novel classes, this
    keeps that relation: ``lambda T^2 sum_i w_i CE(p_t,i, p_s,i) / sum_i w_i`` over the unlabeled
    samples, with the gate ``w_i`` the student's belief in a known class.

    As in the official code (kleinzcy/Cr-KD-NCD, model/losses.py): a cross-entropy, so that the
    value does not vanish where both agree (it is the teacher's entropy then); the gradient flows
    through the gate as well (``detach_gate=True`` stops it; then it vanishes where both agree);
    ``T`` is 0.15 there, on logits that are divided by the training temperature 0.1 before: give
    their product for logits as they are.

    Args:
        strength: ``lambda``, at least 0.
        known: ``K``: the known classes are the first ones.
        teacher: the network that was taught them; returns ``K`` logits or more.
        source: a copy of the module in its place: ``"reference"`` are the weights that training
            starts with.
        temperature: ``T``, above 0.
        unlabeled: the label that marks samples of novel classes (-1, for example), the only ones
            that count; ``None`` counts all samples.
        detach_gate: take the gate as a constant.
        decay: of the average of ``source="ema"``.
        signals: where ``inputs``, ``logits`` (B, C) and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: without a teacher, with two, or if a number is outside its range.
        RegularizationError: if logits are not (B, C) with more than ``known`` classes, or the
            teacher's fewer.

    Note:
        Over ranks: global; both sums run over the samples of all ranks, by one all-reduce of four
        numbers a step. A rank without unlabeled samples adds nothing. Under accumulation each
        micro-batch has its own quotient. Cost: a forward pass of the teacher without gradients,
        and three softmaxes.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ClassRelationDistillation
        >>> technique = ClassRelationDistillation(0.1, known=5, source="reference")
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Class-relation Knowledge Distillation for Novel Class Discovery",
            "Gu et al.",
            2023,
            "2307.09158",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits")
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "each micro-batch divides by the sum of its own gates"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(class_relation_distillation)
    explanation: ClassVar[str] = "keeps the relation of novel samples to the known classes"

    def __init__(
        self,
        strength: float | Schedule = 0.1,
        *,
        known: int,
        teacher: nn.Module | None = None,
        source: Source | None = None,
        temperature: float = 0.15,
        unlabeled: int | None = None,
        detach_gate: bool = False,
        decay: float = 0.999,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            teacher=teacher,
            source=source,
            decay=decay,
            ignore_index=None,
            signals=signals,
            name=name,
        )
        cure = 'ClassRelationDistillation(0.1, known=5, source="reference", temperature=0.15)'
        check_range(self, "known", known, 2, cure=cure)
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        self.known = known
        self.temperature = temperature
        self.unlabeled = unlabeled
        self.detach_gate = detach_gate

    def penalty(self, step: Step) -> Tensor | None:
        """Phase 4."""
        if self.teacher is None:
            return None
        student = step.logits
        teacher = self._answer(self.teacher, step.inputs, step.module)
        if student.ndim != 2 or student.shape[1] <= self.known or teacher.shape[1] < self.known:
            raise RegularizationError(
                self,
                f"needs logits (B, C) of more than {self.known} classes, and a teacher that knows "
                f"{self.known}; got {tuple(student.shape)} and {tuple(teacher.shape)}",
                cure="ClassRelationDistillation(known=<the classes of the first task>)",
            )
        losses, gate = class_relation_distillation(student, teacher, self.known, self.temperature)
        counted = self._counted(step, gate)
        gate = gate.detach() if self.detach_gate else gate
        # Of one quotient over all ranks: a mean of each rank's quotients is another number.
        above, below = step.comm.means(
            [JointMean.of(gate * losses, counted), JointMean.of(gate, counted)]
        )
        return above / below.clamp_min(torch.finfo(below.dtype).tiny)

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """The cross-entropy of each row, without the gate."""
        return class_relation_distillation(student, teacher, self.known, self.temperature)[0]

    def _counted(self, step: Step, gate: Tensor) -> Tensor:
        targets = step.find("targets")
        if self.unlabeled is None or not isinstance(targets, Tensor) or targets.ndim != 1:
            return torch.ones_like(gate)
        return (targets == self.unlabeled).to(gate)
