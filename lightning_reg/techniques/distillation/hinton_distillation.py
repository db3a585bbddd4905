"""Teaches the softened predictions of a teacher beside the labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.distillation import Distillation
from lightning_reg.mechanisms.teacher import Source

__all__ = ["HintonDistillation", "hinton_distillation"]


def hinton_distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """``T^2 KL(softmax(t / T) || softmax(s / T))`` of each row, in nats.

    Args:
        student: (N, C) logits ``s``.
        teacher: (N, C) logits ``t``; no gradient flows.
        temperature: ``T`` above 0.

    Returns:
        (N,), at least 0. The gradient by ``s`` is ``T (p_s - p_t)``: for large ``T`` it tends to
        ``(s - t) / C`` of centred logits, whatever ``T`` is.
    """
    log_s = F.log_softmax(student / temperature, dim=-1)
    log_t = F.log_softmax(teacher.detach() / temperature, dim=-1)
    p = log_t.exp()
    # 0 log 0 = 0: a class that the teacher rules out, by -inf too, does not count.
    return temperature**2 * (p * (log_t - log_s).masked_fill(p == 0, 0.0)).sum(-1)


class HintonDistillation(Distillation):
    """Adds the divergence of the student's softened predictions from a teacher's (KD).

    Hinton, Vinyals, Dean (2015), Distilling the Knowledge in a Neural Network, arXiv:1503.02531.

    The loss becomes ``CE + lambda T^2 KL(p_t || p_s)`` with ``p = softmax(z / T)``. The factor
    ``T^2`` keeps the size of the gradient as ``T`` changes. The weighted form
    ``(1 - a) CE + a T^2 KL`` is ``1 - a`` times this one at ``lambda = a / (1 - a)``.

    Defaults: ``T = 4`` and, up to a factor of the whole loss, 0.9 KL to 0.1 CE, as in the common
    benchmark megvii-research/mdistiller; so ``strength`` 9. It works with a given network, or
    with a copy of the module: ``source="ema"`` is a mean teacher, ``source="past"`` the student of
    the epoch before.

    Args:
        strength: ``lambda``, at least 0.
        teacher: a network that returns logits for the inputs of the step.
        source: a copy of the module in its place: ``"ema"``, ``"past"``, ``"reference"``,
            ``"random"``.
        temperature: ``T``, above 0.
        decay: of the average of ``source="ema"``.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more.
        signals: where ``inputs``, ``logits`` and ``targets`` are; targets are optional.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: without a teacher, with two, or if a number is outside its range.
        RegularizationError: if the teacher's logits are not of the student's shape, or if a run
            resumes with another teacher.

    Note:
        The teacher sees what the student sees: augmented, mixed and erased inputs as well, so that
        it labels exactly those. Over ranks: global; each row counts once, for one all-reduce of
        two numbers a step that all techniques share. Under accumulation each micro-batch takes
        its own mean. Cost: a forward pass of the teacher without gradients, and two softmaxes.

        A given teacher is not saved with the checkpoint; a resume checks that it is the same.
        It hurts where the teacher is much worse than the labels, or wrong in a systematic way.

    Example:
        >>> import lightning as L, torch
        >>> from lightning_reg import HintonDistillation
        >>> teacher = torch.nn.Linear(8, 4)  # a trained network
        >>> trainer = L.Trainer(callbacks=[HintonDistillation(9.0, teacher=teacher)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Distilling the Knowledge in a Neural Network", "Hinton et al.", 2015, "1503.02531"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(hinton_distillation)
    explanation: ClassVar[str] = "teaches the softened predictions of a teacher"

    def __init__(
        self,
        strength: float | Schedule = 9.0,
        *,
        teacher: nn.Module | None = None,
        source: Source | None = None,
        temperature: float = 4.0,
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
        cure = 'HintonDistillation(9.0, source="ema", temperature=4.0)'
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        self.temperature = temperature

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """The divergence of each row."""
        return hinton_distillation(student, teacher, self.temperature)
