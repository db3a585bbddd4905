"""Weights each class by how many different samples it really has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.class_frequencies import ClassFrequencyLoss, effective_number_weights
from lightning_reg.mechanisms.loss_replacement import Replaces

__all__ = ["ClassBalancedLoss", "class_balanced_loss"]


def class_balanced_loss(
    logits: Tensor, distribution: Tensor, weights: Tensor, gamma: float = 0.0
) -> Tensor:
    """``-sum_c t_c w_c (1 - p_c)^gamma log p_c`` of each row, in nats.

    Args:
        logits: (N, C), ``p`` their softmax.
        distribution: (N, C) labels ``t``, one-hot or soft.
        weights: (C,) ``w``.
        gamma: of the focal factor; 0 has none.

    Returns:
        (N,), at least 0.
    """
    log_p = F.log_softmax(logits, dim=-1)
    terms = log_p.masked_fill(distribution == 0, 0.0)
    if gamma:
        # The floor keeps the gradient of a power below 1 finite where p is 1.
        terms = terms * (-log_p.expm1()).clamp_min(1e-12) ** gamma
    return -(distribution * weights * terms).sum(-1)


class ClassBalancedLoss(ClassFrequencyLoss):
    """Replaces the cross-entropy by one in which classes weigh by their effective number.

    Cui, Jia, Lin, Song, Belongie (2019), Class-Balanced Loss Based on Effective Number of
    Samples, arXiv:1901.05555.

    New samples of a class overlap more and more with those that it has: ``n`` of them are worth
    ``E_n = (1 - beta^n) / (1 - beta)``. The loss is ``-w_y (1 - p_y)^gamma log p_y`` with ``w_c``
    proportional to ``1 / E_{n_c}`` and of mean 1 over classes; its mean runs over samples, not
    over weights, as in the official code (richardaecn/class-balanced-loss, src/cifar_main.py,
    which has softmax and sigmoid forms; this is the softmax one, with the focal factor on it).

    Args:
        strength: the share of this loss in [0, 1]; the rest stays the cross-entropy.
        class_counts: how many training samples each class has.
        beta: in [0, 1). The paper takes 0.9, 0.99, 0.999 or 0.9999 by data set.
        gamma: of the focal factor, at least 0; 0 has none.
        replaces: what of the user's loss goes: ``"cross_entropy"`` (checked), ``"term"`` or
            ``"loss"``.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if counts are not above 0, or a number is outside its range.
        RegularizationError: if logits have another number of classes, or the user's loss is no
            cross-entropy and ``replaces`` does not say what to do.

    Note:
        Over ranks: global, being a mean over samples; nothing is communicated. Accumulation
        changes nothing. Cost: one multiplication per logit. Strong weights on few samples make
        them memorized: the paper of LDAM weights from a late epoch on, with a Schedule for
        ``strength``.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ClassBalancedLoss
        >>> technique = ClassBalancedLoss(class_counts=[900, 90, 10], beta=0.999)
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Class-Balanced Loss Based on Effective Number of Samples",
            "Cui et al.",
            2019,
            "1901.05555",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(class_balanced_loss)
    explanation: ClassVar[str] = "weights classes by their effective number of samples"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        class_counts: Sequence[float],
        beta: float = 0.9999,
        gamma: float = 0.0,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, class_counts=class_counts, replaces=replaces, signals=signals, name=name
        )
        cure = "ClassBalancedLoss(class_counts=[900, 90, 10], beta=0.999, gamma=0.0)"
        check_range(self, "beta", beta, 0, 1, high_open=True, cure=cure)
        check_range(self, "gamma", gamma, 0, cure=cure)
        self.beta = beta
        self.gamma = gamma

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The weighted loss of each row."""
        weights = effective_number_weights(self.counts(logits), self.beta)
        return class_balanced_loss(logits, distribution, weights, self.gamma)
