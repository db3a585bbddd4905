"""Adds one minus the Tversky index, an overlap that prices both kinds of errors apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.class_scores import Task
from lightning_reg.mechanisms.confusion_loss import ConfusionLoss, Counts, Over

__all__ = ["TverskyLoss", "tversky_loss"]


def tversky_loss(
    probabilities: Tensor,
    labels: Tensor,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = 1.0,
) -> Tensor:
    """``1 - (TP + s) / (TP + alpha FP + beta FN + s)`` of each class.

    With ``TP = sum p y``, ``FP = sum p (1 - y)`` and ``FN = sum (1 - p) y``.

    Args:
        probabilities: ``p`` (N, C) of the N positions of a region, in [0, 1].
        labels: ``y`` (N, C), 0 and 1, or between them.
        alpha: the price of a false positive.
        beta: the price of a false negative.
        smooth: ``s``, above 0.

    Returns:
        (C,), in [0, 1].
    """
    parts = probabilities * labels, probabilities, labels
    return _loss(Counts.of(*parts), alpha, beta, smooth)


def _loss(counts: Counts, alpha: float, beta: float, smooth: float) -> Tensor:
    hits = counts.both
    errors = alpha * (counts.predicted - hits) + beta * (counts.labelled - hits)
    return 1 - (hits + smooth) / (hits + errors + smooth)


class TverskyLoss(ConfusionLoss):
    """Adds one minus the Tversky index, an overlap that prices both kinds of errors apart.

    Li, Sun, Meng, Liang, Wu, Li (2019), Dice Loss for Data-imbalanced NLP Tasks, arXiv:1911.02855,
    as a loss for rare classes of tokens; first in Salehi, Erdogmus, Gholipour (2017), Tversky loss
    function for image segmentation using 3D fully convolutional deep networks, arXiv:1706.05721.

    ``L = 1 - (TP + s) / (TP + alpha FP + beta FN + s)`` for each class, averaged over classes. With
    ``alpha = beta = 1/2`` it is the Dice loss with ``2 s`` for its ``s``, with ``alpha = beta = 1``
    the soft Jaccard loss. ``beta > alpha`` buys recall with precision: for ``alpha + beta = 1`` it
    is one minus the F score with ``b^2 = beta / alpha``. The defaults 0.3 and 0.7 are those that
    the second paper found best for small lesions. The formula is from memory of the papers; not
    checked against code (the released code of the first has the Dice form only). ``s = 1`` is ours.

    Args:
        strength: the multiplier, at least 0.
        alpha: the price of a false positive, at least 0.
        beta: the price of a false negative, at least 0.
        smooth: ``s``, above 0, in positions.
        task: ``"multiclass"``: a softmax over the classes; ``"multilabel"``: a sigmoid for each
            class, also for one, with labels 0 and 1.
        over: sums run over each ``"image"``, over the ``"batch"`` of all ranks, or over single
            ``"position"``s.
        classes: the classes that are averaged; ``[1, 2]`` leaves the background out.
        present_only: leave classes out where no label of the region has them.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or ``alpha`` and ``beta`` are both 0.
        RegularizationError: in the first step, if logits and labels do not fit the task.

    Note:
        Over ranks: global. ``"image"``: the mean over the images of all ranks, for a share of the
        one all-reduce of all means. ``"batch"``: the sums of all ranks are added up with
        gradients before the ratio is taken, one all-reduce of 4 C numbers in forward and one in
        backward; under accumulation each micro-batch is a batch of its own. Cost: a softmax and a
        few products over the logits.

        It hurts calibration: the price of the errors moves the threshold into the scores. To
        train on it alone return ``0.0 * logits.sum()`` as the loss.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import TverskyLoss
        >>> trainer = L.Trainer(callbacks=[TverskyLoss(alpha=0.3, beta=0.7)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Dice Loss for Data-imbalanced NLP Tasks", "Li et al.", 2019, "1911.02855"),
        Paper(
            "Tversky loss function for image segmentation using 3D fully convolutional deep "
            "networks",
            "Salehi et al.",
            2017,
            "1706.05721",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": 'with over="batch" the counts are those of one micro-batch',
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(tversky_loss)
    explanation: ClassVar[str] = "adds one minus an overlap that prices both kinds of errors apart"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        alpha: float = 0.3,
        beta: float = 0.7,
        smooth: float = 1.0,
        task: Task = "multiclass",
        over: Over = "image",
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
        cure = "TverskyLoss(alpha=0.3, beta=0.7, smooth=1.0)"
        check_range(self, "alpha", alpha, 0, cure=cure)
        check_range(self, "beta", beta, 0, cure=cure)
        check_range(self, "alpha + beta", alpha + beta, 0, low_open=True, cure=cure)
        check_range(self, "smooth", smooth, 0, low_open=True, cure=cure)
        self.alpha = alpha
        self.beta = beta
        self.smooth = smooth

    def losses(self, counts: Counts) -> Tensor:
        """One minus the index."""
        return _loss(counts, self.alpha, self.beta, self.smooth)
