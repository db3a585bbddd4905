"""Adds one minus a metric of the confusion matrix, which is counted softly over the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.class_scores import Task
from lightning_reg.mechanisms.confusion_loss import ConfusionLoss, Counts

__all__ = ["AnyLoss", "any_loss"]

ConfusionMetric = Literal["f_beta", "balanced_accuracy", "g_mean", "mcc", "accuracy"]
_EPS = 1e-5


def any_loss(
    probabilities: Tensor,
    labels: Tensor,
    metric: ConfusionMetric = "f_beta",
    beta: float = 1.0,
    slope: float = 73.0,
) -> Tensor:
    """One minus the metric of each class, from the counts of ``A(p) = 1 / (1 + e^(-L (p - 1/2)))``.

    ``TP = sum y A``, ``FP = sum (1 - y) A``, ``FN = sum y (1 - A)``, ``TN = sum (1 - y)(1 - A)``:

    - ``"f_beta"``: ``(1 + b^2) TP / ((1 + b^2) TP + FP + b^2 FN)``;
    - ``"balanced_accuracy"``: ``(TPR + TNR) / 2`` with ``TPR = TP / (TP + FN)``;
    - ``"g_mean"``: ``sqrt(TPR TNR)``;
    - ``"mcc"``: Matthews' correlation coefficient;
    - ``"accuracy"``: ``(TP + TN) / N``.

    Args:
        probabilities: ``p`` (N, C), each against the rest.
        labels: ``y`` (N, C), 0 and 1, or between them.
        metric: which of them.
        beta: ``b`` of ``"f_beta"``.
        slope: ``L``, above 0; a large one counts as a threshold of 1/2 does.

    Returns:
        (C,), in [0, 1]; up to 2 for ``"mcc"``. A class that has no positives, or negatives where
        the metric asks for them, gives 1.
    """
    return _LOSSES[metric](Counts.of(*_terms(probabilities, labels, slope)), beta)


def _terms(p: Tensor, y: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    amplified = torch.sigmoid(slope * (p - 0.5))
    return amplified * y, amplified, y


def _f_beta(counts: Counts, beta: float) -> Tensor:
    share = beta**2
    return 1 - (1 + share) * counts.both / (share * counts.labelled + counts.predicted + _EPS)


def _accuracy(counts: Counts, beta: float) -> Tensor:
    wrong = counts.predicted + counts.labelled - 2 * counts.both
    return wrong / counts.positions.clamp_min(1)


def _balanced_accuracy(counts: Counts, beta: float) -> Tensor:
    positives, negatives, hits, rejections = _sides(counts)
    return 1 - (negatives * hits + positives * rejections) / (2 * positives * negatives + _EPS)


def _g_mean(counts: Counts, beta: float) -> Tensor:
    positives, negatives, hits, rejections = _sides(counts)
    return 1 - _root(hits * rejections / (positives * negatives + _EPS))


def _mcc(counts: Counts, beta: float) -> Tensor:
    # Of shares of the batch: products of four counts overflow.
    size = counts.positions.clamp_min(1)
    positives, negatives, hits, _ = (side / size for side in _sides(counts))
    predicted = counts.predicted / size
    spread = _root(positives * negatives * predicted * (1 - predicted))
    return 1 - (hits - positives * predicted) / spread.clamp_min(_EPS)


def _sides(counts: Counts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positives, negatives, true positives and true negatives."""
    positives, hits = counts.labelled, counts.both
    negatives = counts.positions - positives
    rejections = negatives - (counts.predicted - hits)
    return positives, negatives, hits, rejections


def _root(square: Tensor) -> Tensor:
    """The square root, with a gradient of 0 at 0."""
    positive = square > 0
    return square.where(positive, torch.ones_like(square)).sqrt() * positive


_LOSSES: dict[str, Callable[[Counts, float], Tensor]] = {
    "f_beta": _f_beta,
    "balanced_accuracy": _balanced_accuracy,
    "g_mean": _g_mean,
    "mcc": _mcc,
    "accuracy": _accuracy,
}


class AnyLoss(ConfusionLoss):
    """Adds one minus a metric of the confusion matrix, which is counted softly over the batch.

    Han, Moniz, Chawla (2024), AnyLoss: Transforming Classification Metrics into Loss Functions,
    arXiv:2405.14745.

    Each probability p of a class against the rest is amplified, ``A = 1 / (1 + e^(-L (p - 1/2)))``,
    to nearly 0 or 1, so that its sums are the counts that a threshold of 1/2 gives, and have a
    gradient. The loss is one minus F-beta, balanced accuracy, G-mean, Matthews' coefficient or
    accuracy of those counts, averaged over classes: see :func:`any_loss`.

    The amplification, ``L`` up to 73, ``f_beta`` and ``balanced_accuracy``, with 1e-5 in their
    denominators, are those of the first author's code (doheonhan/anyloss_extension@0074373,
    README.md), whose ``g_mean`` leaves the square root out; here it is there, as in the metric's
    definition. ``mcc`` is from that of the metric. ``L = 73`` is the paper's choice, from memory.

    Args:
        strength: the multiplier, at least 0.
        metric: ``"f_beta"``, ``"balanced_accuracy"``, ``"g_mean"``, ``"mcc"`` or ``"accuracy"``.
        beta: of ``"f_beta"``, above 0; above 1 recall weighs more than precision.
        slope: ``L``, above 0. :class:`AttributeSchedule` can raise it over the run.
        task: ``"multiclass"``: probabilities of a softmax, each class against the rest;
            ``"multilabel"``: a sigmoid for each class, also for one, with labels 0 and 1.
        classes: the classes that are averaged; ``[1]`` is the positive class of two.
        present_only: leave classes out that no sample of the batch has.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if logits and labels do not fit the task.

    Note:
        Over ranks: global; the counts of all ranks are added up with gradients before the metric
        is taken, one all-reduce of 4 C numbers in forward and one in backward: a rank without
        positives has no metric of its own. Under accumulation each micro-batch is a batch of its
        own. Cost: a softmax or sigmoid twice, and a few products, over the logits.

        It hurts, or does nothing, where predictions are sure: the slope of ``A`` is 18 at 1/2 and
        below 1e-9 further than 0.4 away, so that sure errors get no gradient. The user's loss is
        kept for that; to train on this one alone, with a small ``slope``, return ``0.0 *
        logits.sum()``. Small batches have few positives, and noisy metrics.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AnyLoss
        >>> trainer = L.Trainer(callbacks=[AnyLoss(metric="f_beta", classes=[1])], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "AnyLoss: Transforming Classification Metrics into Loss Functions",
            "Han et al.",
            2024,
            "2405.14745",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "the metric is that of one micro-batch",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(any_loss)
    explanation: ClassVar[str] = "adds one minus a metric of the batch's soft confusion matrix"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        metric: ConfusionMetric = "f_beta",
        beta: float = 1.0,
        slope: float = 73.0,
        task: Task = "multiclass",
        classes: Sequence[int] | None = None,
        present_only: bool = False,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            task=task,
            over="batch",
            classes=classes,
            present_only=present_only,
            ignore_index=ignore_index,
            class_dim=class_dim,
            signals=signals,
            name=name,
        )
        if metric not in _LOSSES:
            raise ArgumentError(
                self,
                f"`metric` must be one of {', '.join(_LOSSES)}, got {metric!r}",
                cure='AnyLoss(metric="f_beta")',
            )
        cure = "AnyLoss(beta=1.0, slope=73.0)"
        check_range(self, "beta", beta, 0, low_open=True, cure=cure)
        check_range(self, "slope", slope, 0, low_open=True, cure=cure)
        self.metric: ConfusionMetric = metric
        self.beta = beta
        self.slope = slope

    def terms(self, probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With amplified probabilities."""
        return _terms(probabilities, labels, self.slope)

    def losses(self, counts: Counts) -> Tensor:
        """One minus the metric."""
        return _LOSSES[self.metric](counts, self.beta)
