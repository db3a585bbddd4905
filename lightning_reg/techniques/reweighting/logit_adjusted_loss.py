"""Trains for the balanced error on a training set in which classes are not balanced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.criterion import soft_cross_entropy
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.class_frequencies import ClassFrequencyLoss
from lightning_reg.mechanisms.loss_replacement import Replaces

__all__ = ["LogitAdjustedLoss", "logit_adjusted_loss"]


def logit_adjusted_loss(
    logits: Tensor, distribution: Tensor, counts: Tensor, tau: float = 1.0
) -> Tensor:
    """The cross-entropy of ``z_c + tau log pi_c`` in each row, in nats.

    Args:
        logits: (N, C) ``z``.
        distribution: (N, C) labels, one-hot or soft.
        counts: (C,) above 0; ``pi`` is their share of the sum.
        tau: the strength of the adjustment; 0 gives the cross-entropy.

    Returns:
        (N,), at least 0 for one-hot labels.
    """
    prior = (counts / counts.sum()).log()
    return soft_cross_entropy(logits + tau * prior, distribution)


class LogitAdjustedLoss(ClassFrequencyLoss):
    """Replaces the cross-entropy by that of logits which carry the class prior.

    Menon, Jayasumana, Rawat, Jain, Veit, Kumar (2020), Long-tail learning via logit adjustment,
    arXiv:2007.07314.

    ``log(1 + sum_{c != y} (pi_c / pi_y)^tau e^{z_c - z_y})``: the softmax of ``z + tau log pi``.
    The network then models ``p(x | y)`` up to a factor, so that at ``tau = 1`` the largest of the
    *unadjusted* logits is the Bayes decision for the balanced error: predict from logits as they
    are. The formula and ``tau`` 1 are the paper's (its equation 10), and what a later paper's code
    does (Pepper-lll/NCfeature@c681f7e, losses.py). Soft labels are ours.

    Args:
        strength: the share of this loss in [0, 1]; the rest stays the cross-entropy.
        class_counts: how many training samples each class has.
        tau: above 0; 1 is consistent for the balanced error.
        replaces: what of the user's loss goes: ``"cross_entropy"`` (checked), ``"term"`` or
            ``"loss"``.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if counts are not above 0, or ``tau`` is not.
        RegularizationError: if logits have another number of classes, or the user's loss is no
            cross-entropy and ``replaces`` does not say what to do.

    Note:
        Over ranks: global, being a mean over samples; nothing is communicated. Accumulation
        changes nothing. Cost: one addition per logit. Probabilities from the unadjusted logits
        are those of a balanced population; for the training one add ``log pi`` again.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import LogitAdjustedLoss
        >>> technique = LogitAdjustedLoss(class_counts=[900, 90, 10])
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Long-tail learning via logit adjustment", "Menon et al.", 2020, "2007.07314"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(logit_adjusted_loss)
    explanation: ClassVar[str] = "adds the class prior to the logits of the loss"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        class_counts: Sequence[float],
        tau: float = 1.0,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, class_counts=class_counts, replaces=replaces, signals=signals, name=name
        )
        cure = "LogitAdjustedLoss(class_counts=[900, 90, 10], tau=1.0)"
        check_range(self, "tau", tau, 0, low_open=True, cure=cure)
        self.tau = tau

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The adjusted cross-entropy of each row."""
        return logit_adjusted_loss(logits, distribution, self.counts(logits), self.tau)
