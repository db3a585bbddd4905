"""Teaches the order in which a teacher ranks the classes, the label in front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.distillation import Distillation
from lightning_reg.mechanisms.teacher import Source

__all__ = ["PlackettLuceDistillation", "plackett_luce_distillation"]


def plackett_luce_distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """``sum_k a_k (log sum_{l >= k} exp(s_pi_l) - s_pi_k)`` of each row, in nats.

    ``pi`` is the label and then the other classes by falling teacher logit (by index where those
    are equal), ``a_k = softmax(t / T)_{pi_k}`` the teacher's probability of the k-th.

    Args:
        student: (N, C) logits ``s``.
        teacher: (N, C) logits ``t``; no gradient flows.
        labels: (N,) the classes.
        temperature: ``T`` above 0, of the teacher's weights.

    Returns:
        (N,), at least 0; convex in ``s`` and the same when a number is added to all of ``s``.
    """
    teacher = teacher.detach()
    # Infinity puts the label in front.
    rank = teacher.scatter(-1, labels.unsqueeze(-1), torch.inf)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    scores = student.gather(-1, order)
    weights = (teacher / temperature).softmax(-1).gather(-1, order)
    remaining = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (weights * (remaining - scores)).sum(-1)


class PlackettLuceDistillation(Distillation):
    """A list-wise distillation: choose the label first, then classes as the teacher would (PLD).

    Bassam, Zhu, Bian (2025), PLD: A Choice-Theoretic List-Wise Knowledge Distillation,
    arXiv:2506.12542.

    Logits are read as the worths of a Plackett-Luce model, in which the classes are chosen one
    after the other without putting back. The student is to give the order ``pi`` = (label, then
    the others as the teacher ranks them) a high probability, its k-th choice weighted by the
    teacher's confidence in that class: ``L = sum_k a_k (log sum_{l >= k} e^{s_pi_l} - s_pi_k)``.
    With all weight on the first choice it is the cross-entropy of the label, so it can replace the
    user's loss or stand beside it.

    The label in front and the weights are in the paper's abstract; the formula is from memory, no
    official code was found. Where the teacher is sure of another class than the label, ``a_1`` is
    small and the label counts little, by design.

    Args:
        strength: the multiplier of the loss, at least 0. The paper trains on this loss alone;
            beside the user's cross-entropy the default 1 is ours.
        teacher: a network that returns logits for the inputs of the step.
        source: a copy of the module in its place: ``"ema"``, ``"past"``, ``"reference"``,
            ``"random"``.
        temperature: of the teacher's weights, above 0.
        decay: of the average of ``source="ema"``.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more.
        signals: where ``inputs``, ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: without a teacher, with two, or if a number is outside its range.
        RegularizationError: if logits and labels do not belong together, or if a run resumes with
            another teacher.

    Note:
        A label that is smoothed or mixed counts as its most likely class. Over ranks: global, each
        row counting once. Under accumulation each micro-batch takes its own mean. Cost: a forward
        pass of the teacher without gradients, a sort and a cumulated logsumexp over the classes.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import PlackettLuceDistillation
        >>> technique = PlackettLuceDistillation(1.0, source="ema")
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
            "Bassam et al.",
            2025,
            "2506.12542",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits", "targets"})
    labelled: ClassVar[bool] = True
    function: ClassVar[Callable[..., Any] | None] = staticmethod(plackett_luce_distillation)
    explanation: ClassVar[str] = "teaches the teacher's ranking of the classes, the label in front"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        teacher: nn.Module | None = None,
        source: Source | None = None,
        temperature: float = 1.0,
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
        cure = 'PlackettLuceDistillation(1.0, source="ema", temperature=1.0)'
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        self.temperature = temperature

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of each row."""
        assert labels is not None
        return plackett_luce_distillation(student, teacher, labels, self.temperature)
