"""Teaches a teacher's confidence in the label and its view of the other classes apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.distillation import Distillation
from lightning_reg.mechanisms.teacher import Source

__all__ = ["DecoupledDistillation", "decoupled_distillation"]


def decoupled_distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """``T^2 (alpha TCKD + beta NCKD)`` of each row, in nats.

    With ``p = softmax(z / T)``, ``b = (p_y, 1 - p_y)`` and ``q`` the softmax over the classes but
    ``y``: ``TCKD = KL(b_t || b_s)``, ``NCKD = KL(q_t || q_s)``. At ``alpha = 1`` and
    ``beta = 1 - p_t,y`` the sum is the ordinary distillation loss.

    Args:
        student: (N, C) logits, of three classes or more.
        teacher: (N, C) logits; no gradient flows.
        labels: (N,) the classes ``y``.
        alpha: the weight of the target class.
        beta: the weight of the others.
        temperature: ``T`` above 0.

    Returns:
        (N,), at least 0.
    """
    log_s = F.log_softmax(student / temperature, dim=-1)
    log_t = F.log_softmax(teacher.detach() / temperature, dim=-1)
    label = F.one_hot(labels, student.shape[-1]).bool()
    target = _divergence(_binary(log_t, label), _binary(log_s, label))
    others = _divergence(_without(log_t, label), _without(log_s, label))
    return temperature**2 * (alpha * target + beta * others)


def _binary(log_p: Tensor, label: Tensor) -> Tensor:
    """``log (p_y, 1 - p_y)``, the second without loss of digits where ``p_y`` is near 1."""
    chosen = log_p.masked_fill(~label, 0.0).sum(-1)
    rest = log_p.masked_fill(label, -torch.inf).logsumexp(-1)
    return torch.stack([chosen, rest], -1)


def _without(log_p: Tensor, label: Tensor) -> Tensor:
    return log_p.masked_fill(label, -torch.inf).log_softmax(-1)


def _divergence(log_t: Tensor, log_s: Tensor) -> Tensor:
    p = log_t.exp()
    # The class that is left out has no probability in either: no part in the sum.
    return (p * (log_t - log_s).masked_fill(p == 0, 0.0)).sum(-1)


class DecoupledDistillation(Distillation):
    """Weights what a teacher says of the label and of the other classes separately (DKD).

    Zhao, Cui, Song, Qiu, Liang (2022), Decoupled Knowledge Distillation, arXiv:2203.08679.

    Ordinary distillation is ``KL(b_t || b_s) + (1 - p_t,y) KL(q_t || q_s)``, with ``b`` the
    probabilities of label and rest, and ``q`` those among the rest. The factor silences the second
    term, the knowledge about the other classes, just where the teacher is sure. Here both have
    weights of their own: ``lambda T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s))``.

    As in the official code (megvii-research/mdistiller, mdistiller/distillers/DKD.py), but for
    its mask of -1000 in place of minus infinity. Its defaults for CIFAR-100 are ``alpha`` 1,
    ``beta`` 8 (2 for some pairs), ``T`` 4, with the weight of the whole growing from 0 to 1 over
    20 epochs: ``strength=WarmupSchedule(...)``.

    Args:
        strength: ``lambda``, at least 0.
        teacher: a network that returns logits for the inputs of the step.
        source: a copy of the module in its place: ``"ema"``, ``"past"``, ``"reference"``,
            ``"random"``.
        alpha: the weight of the target class, at least 0.
        beta: the weight of the other classes, at least 0.
        temperature: ``T``, above 0.
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
        pass of the teacher without gradients, and four softmaxes. With two classes the second
        term is 0.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import DecoupledDistillation
        >>> technique = DecoupledDistillation(1.0, source="ema", beta=8.0)
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Decoupled Knowledge Distillation", "Zhao et al.", 2022, "2203.08679"),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits", "targets"})
    labelled: ClassVar[bool] = True
    function: ClassVar[Callable[..., Any] | None] = staticmethod(decoupled_distillation)
    explanation: ClassVar[str] = "teaches a teacher's view of the label and of the rest apart"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        teacher: nn.Module | None = None,
        source: Source | None = None,
        alpha: float = 1.0,
        beta: float = 8.0,
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
        cure = 'DecoupledDistillation(1.0, source="ema", alpha=1.0, beta=8.0, temperature=4.0)'
        check_range(self, "alpha", alpha, 0, cure=cure)
        check_range(self, "beta", beta, 0, cure=cure)
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of each row."""
        assert labels is not None
        return decoupled_distillation(
            student, teacher, labels, self.alpha, self.beta, self.temperature
        )
