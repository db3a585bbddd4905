"""Adds to the cross-entropy the one with labels and predictions in each other's place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.criterion import soft_cross_entropy
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces

__all__ = ["SymmetricCrossEntropy", "symmetric_cross_entropy"]


def symmetric_cross_entropy(
    logits: Tensor,
    distribution: Tensor,
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = math.log(1e-4),
) -> Tensor:
    """``-alpha sum_c t_c log p_c - beta sum_c p_c log t_c`` of each row, in nats.

    Args:
        logits: (N, C), ``p`` their softmax.
        distribution: (N, C) labels ``t``, one-hot or soft.
        alpha: the weight of the cross-entropy.
        beta: the weight of the reverse one.
        log_zero: the least value of ``log t_c``, in place of ``log 0``.

    Returns:
        (N,), at least 0. For one-hot labels the second term is ``-beta log_zero (1 - p_y)``.
    """
    reverse = -(logits.softmax(-1) * distribution.clamp_min(math.exp(log_zero)).log()).sum(-1)
    return alpha * soft_cross_entropy(logits, distribution) + beta * reverse


class SymmetricCrossEntropy(LossReplacement):
    """Balances the cross-entropy with its noise-tolerant reverse (SCE).

    Wang, Ma, Chen, Luo, Yi, Bailey (2019), Symmetric Cross Entropy for Robust Learning with Noisy
    Labels, arXiv:1908.06112.

    ``alpha CE + beta RCE`` with ``RCE = -sum_c p_c log t_c`` and ``log 0`` a number: for a label it
    is ``-log_zero (1 - p_y)``, an absolute error, which symmetric noise does not bend, while the
    cross-entropy learns hard classes. Confirmed with HanxunH/SCELoss-Reproduce, loss.py: ``alpha``
    0.1 and ``beta`` 1 for CIFAR-10 (6 and 0.1 for CIFAR-100), and ``log 0`` is ``log 1e-4 =
    -9.2``; the paper writes -4 for CIFAR-10. The code's floor of 1e-7 under probabilities is not
    needed here.

    Args:
        strength: the share of this loss in [0, 1]; the rest stays the cross-entropy.
        alpha: at least 0.
        beta: at least 0.
        log_zero: below 0.
        replaces: what of the user's loss goes: ``"cross_entropy"`` (checked), ``"term"`` or
            ``"loss"``.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if a number is outside its range.
        RegularizationError: in the first step, if the user's loss is no cross-entropy and
            ``replaces`` does not say what to do.

    Note:
        Over ranks: global, being a mean over samples; nothing is communicated. Accumulation
        changes nothing. Cost: a softmax beside that of the cross-entropy. Mixed labels are taken as
        they are, ``log t_c`` of their shares, so the loss of a mixture is less than the mixture of
        losses. Smoothed labels have no zero, so the reverse term is small on them: use one of
        the two.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SymmetricCrossEntropy
        >>> trainer = L.Trainer(callbacks=[SymmetricCrossEntropy(alpha=0.1)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Symmetric Cross Entropy for Robust Learning with Noisy Labels",
            "Wang et al.",
            2019,
            "1908.06112",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(symmetric_cross_entropy)
    explanation: ClassVar[str] = "adds the reverse cross-entropy, which wrong labels bend less"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        alpha: float = 0.1,
        beta: float = 1.0,
        log_zero: float = math.log(1e-4),
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        cure = "SymmetricCrossEntropy(alpha=0.1, beta=1.0, log_zero=-4.0)"
        check_range(self, "alpha", alpha, 0, cure=cure)
        check_range(self, "beta", beta, 0, cure=cure)
        check_range(self, "log_zero", log_zero, None, 0, high_open=True, cure=cure)
        self.alpha = alpha
        self.beta = beta
        self.log_zero = log_zero

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss of each row."""
        return symmetric_cross_entropy(logits, distribution, self.alpha, self.beta, self.log_zero)
