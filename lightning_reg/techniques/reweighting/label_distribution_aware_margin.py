"""Asks for larger margins where a class has fewer samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.criterion import soft_cross_entropy
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.class_frequencies import ClassFrequencyLoss, effective_number_weights
from lightning_reg.mechanisms.loss_replacement import Replaces

__all__ = ["LabelDistributionAwareMargin", "class_margins", "label_distribution_aware_margin"]


def class_margins(counts: Tensor, max_margin: float = 0.5) -> Tensor:
    """``n_c^(-1/4)`` of each class, scaled so that the rarest has ``max_margin``.

    Args:
        counts: (C,) above 0.
        max_margin: the largest margin.

    Returns:
        (C,).
    """
    margins = counts.pow(-0.25)
    return margins * (max_margin / margins.max())


def label_distribution_aware_margin(
    logits: Tensor, distribution: Tensor, margins: Tensor, scale: float = 30.0
) -> Tensor:
    """The cross-entropy of ``s (z_c - m_c t_c)`` in each row, in nats.

    Args:
        logits: (N, C) ``z``; cosines in the paper.
        distribution: (N, C) labels ``t``: one-hot rows lower the label's logit by its margin, soft
            ones each class by its share.
        margins: (C,) ``m``.
        scale: ``s``.

    Returns:
        (N,).
    """
    return soft_cross_entropy(scale * (logits - distribution * margins), distribution)


class LabelDistributionAwareMargin(ClassFrequencyLoss):
    """Replaces the cross-entropy by one with margins that grow as classes get rarer (LDAM).

    Cao, Wei, Gaidon, Arechiga, Ma (2019), Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss, arXiv:1906.07413.

    ``CE(s (z - m_y e_y))`` with ``m_c`` proportional to ``n_c^(-1/4)``, which balances the
    generalization bounds of the classes. As in the official code (kaidic/LDAM-DRW, losses.py):
    the largest margin is 0.5 and the scale 30. There ``z`` are cosines, from a last layer that
    normalizes features and weights; on logits without a bound the scale of 30 saturates: give
    such a layer to the network, or ``scale=1.0``. Its deferred re-weighting is the paper's second
    part: from epoch ``reweight_from`` on (160 of 200 there) each class weighs by its effective
    number as in :class:`ClassBalancedLoss`, the weighted mean being over weights, as torch's.

    Args:
        strength: the share of this loss in [0, 1]; the rest stays the cross-entropy.
        class_counts: how many training samples each class has.
        max_margin: the margin of the rarest class, above 0.
        scale: ``s``, above 0.
        reweight_from: the epoch from which classes are weighted; ``None`` never weights them.
        beta: of the effective number, in [0, 1).
        replaces: what of the user's loss goes: ``"cross_entropy"`` (checked), ``"term"`` or
            ``"loss"``.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if counts are not above 0, or a number is outside its range.
        RegularizationError: if logits have another number of classes, or the user's loss is no
            cross-entropy and ``replaces`` does not say what to do.

    Note:
        Over ranks: global, being a mean over samples. Weights are divided by their mean over the
        training set, not over the batch, so that nothing is communicated and accumulation changes
        nothing; torch's weighted mean, which the official code uses, divides by that of the
        batch. Cost: two operations per logit.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import LabelDistributionAwareMargin
        >>> technique = LabelDistributionAwareMargin(class_counts=[900, 90, 10], reweight_from=160)
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
            "Cao et al.",
            2019,
            "1906.07413",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(label_distribution_aware_margin)
    explanation: ClassVar[str] = "asks for larger margins of rarer classes"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        class_counts: Sequence[float],
        max_margin: float = 0.5,
        scale: float = 30.0,
        reweight_from: int | None = None,
        beta: float = 0.9999,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, class_counts=class_counts, replaces=replaces, signals=signals, name=name
        )
        cure = "LabelDistributionAwareMargin(class_counts=[900, 90, 10], max_margin=0.5, scale=30)"
        check_range(self, "max_margin", max_margin, 0, low_open=True, cure=cure)
        check_range(self, "scale", scale, 0, low_open=True, cure=cure)
        check_range(self, "beta", beta, 0, 1, high_open=True, cure=cure)
        if reweight_from is not None:
            check_range(self, "reweight_from", reweight_from, 0, cure=cure)
        self.max_margin = max_margin
        self.scale = scale
        self.reweight_from = reweight_from
        self.beta = beta

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss of each row."""
        counts = self.counts(logits)
        margins = class_margins(counts, self.max_margin)
        losses = label_distribution_aware_margin(logits, distribution, margins, self.scale)
        if self.reweight_from is None or step.epoch < self.reweight_from:
            return losses
        return losses * (distribution * self._weights(counts)).sum(-1)

    def _weights(self, counts: Tensor) -> Tensor:
        weights = effective_number_weights(counts, self.beta)
        return weights / ((counts / counts.sum()) * weights).sum()
