"""Adds a Dice loss in which sure predictions weigh less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.class_scores import Task
from lightning_reg.mechanisms.confusion_loss import ConfusionLoss, Counts, Over

__all__ = ["SelfAdjustingDiceLoss", "self_adjusting_dice_loss"]


def self_adjusting_dice_loss(
    probabilities: Tensor,
    labels: Tensor,
    alpha: float = 0.01,
    smooth: float = 1.0,
    squared: bool = False,
) -> Tensor:
    """``1 - (2 q y + g) / (q + y + g)`` with ``q = (1 - p)^alpha p``, element by element.

    Sums of ``q y``, ``q`` and ``y`` over a region stand in their places where it has one ratio.

    Args:
        probabilities: ``p`` (N, C), in [0, 1].
        labels: ``y`` (N, C), 0 and 1, or between them.
        alpha: the exponent; 0 is the Dice loss of each element.
        smooth: ``g``, above 0.
        squared: with ``q^2 + y^2`` in the denominator.

    Returns:
        (N, C), in [0, 1].
    """
    both, predicted, labelled = _terms(probabilities, labels, alpha, squared)
    return _loss(both, predicted, labelled, smooth)


def _terms(p: Tensor, y: Tensor, alpha: float, squared: bool) -> tuple[Tensor, Tensor, Tensor]:
    # Below this 1 - p is rounding, and a power under 1 would have an infinite gradient there.
    rest = (1 - p).clamp_min(torch.finfo(p.dtype).eps)
    q = rest.pow(alpha) * p
    return (q * y, q.square(), y.square()) if squared else (q * y, q, y)


def _loss(both: Tensor, predicted: Tensor, labelled: Tensor, smooth: float) -> Tensor:
    return 1 - (2 * both + smooth) / (predicted + labelled + smooth)


class SelfAdjustingDiceLoss(ConfusionLoss):
    """Adds a Dice loss in which sure predictions weigh less (DSC), for rare classes.

    Li, Sun, Meng, Liang, Wu, Li (2019), Dice Loss for Data-imbalanced NLP Tasks, arXiv:1911.02855.

    ``L = 1 - (2 sum q y + g) / (sum q + sum y + g)`` with ``q = (1 - p)^alpha p``: a ratio that, as
    the F1 score, has no true negatives in it, and in which a sure prediction adds less. For a rare
    class: ``task="multilabel"``, or ``classes``.

    Over what the sums run, paper and code disagree. The paper has a ratio for each example and
    averages them (``over="position"``); the released code sums over the whole batch for a binary
    task (``over="batch"``), which is the default here: in the average of positions a rare class
    has a rare class's share again, and on a class of 2 % it never came to be predicted, where the
    sums reach a higher F1 score than the cross-entropy.

    Two traps of the formula, the larger ``alpha`` is. By position a positive is least at ``p = 1 /
    (1 + alpha)``: ``alpha = 1`` pulls sure hits down to one half. And the ``q`` of a negative falls
    beyond the same point, to 0 at ``p = 1``: sure false positives are not corrected. Keep
    ``alpha`` small, and the cross-entropy beside it.

    Values and gradients are those of ShannonAI/dice_loss_for_NLP@d437bb9 (loss/dice_loss.py):
    ``over="batch"`` is its binary form, ``over="position", squared=True`` its form for several
    classes (which sums over classes; here they are averaged). Without squares that code divides a
    position's numerator by the sums of the whole batch for several classes, which is not done
    here. Where ``1 - p`` is 0 the released code's gradient is NaN; here it is finite. Defaults:
    ``g = 1`` and ``alpha = 0.01``, as in its scripts. Its option for hard examples is left out.

    Args:
        strength: the multiplier, at least 0.
        alpha: the exponent, at least 0.
        smooth: ``g``, above 0.
        squared: squares in the denominator.
        task: ``"multiclass"``: a softmax over the classes; ``"multilabel"``: a sigmoid for each
            class, also for one, with labels 0 and 1.
        over: sums run over the ``"batch"`` of all ranks or over each ``"image"`` (sample), or
            each ``"position"`` has its own ratio.
        classes: the classes that are averaged; ``[1, 2]`` leaves the background out.
        present_only: leave classes out where no label of the region has them.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if logits and labels do not fit the task.

    Note:
        Over ranks: global. ``"batch"``: the sums of all ranks are added up with gradients before
        the ratio is taken, one all-reduce of 4 C numbers in forward and one in backward; under
        accumulation each micro-batch is a batch of its own. The others are means over the images
        or positions of all ranks, for a share of the one all-reduce of all means. Cost: a softmax,
        a power and a few products over the logits.

        To train on it alone return ``0.0 * logits.sum()`` as the loss.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SelfAdjustingDiceLoss
        >>> trainer = L.Trainer(callbacks=[SelfAdjustingDiceLoss(1.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Dice Loss for Data-imbalanced NLP Tasks", "Li et al.", 2019, "1911.02855"),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": 'with over="batch" the counts are those of one micro-batch',
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(self_adjusting_dice_loss)
    explanation: ClassVar[str] = "adds a Dice loss in which sure predictions weigh less"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        alpha: float = 0.01,
        smooth: float = 1.0,
        squared: bool = False,
        task: Task = "multiclass",
        over: Over = "batch",
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
            over=over,
            classes=classes,
            present_only=present_only,
            ignore_index=ignore_index,
            class_dim=class_dim,
            signals=signals,
            name=name,
        )
        cure = "SelfAdjustingDiceLoss(alpha=0.01, smooth=1.0)"
        check_range(self, "alpha", alpha, 0, cure=cure)
        check_range(self, "smooth", smooth, 0, low_open=True, cure=cure)
        self.alpha = alpha
        self.smooth = smooth
        self.squared = squared

    def terms(self, probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With the factor in the place of ``p``."""
        return _terms(probabilities, labels, self.alpha, self.squared)

    def losses(self, counts: Counts) -> Tensor:
        """One minus the coefficient."""
        return _loss(counts.both, counts.predicted, counts.labelled, self.smooth)
