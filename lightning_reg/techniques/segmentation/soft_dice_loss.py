"""Adds one minus the overlap of predicted and true regions, by the Dice coefficient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.class_scores import Task
from lightning_reg.mechanisms.confusion_loss import ConfusionLoss, Counts, Over

__all__ = ["SoftDiceLoss", "soft_dice_loss"]


def soft_dice_loss(
    probabilities: Tensor, labels: Tensor, smooth: float = 1.0, squared: bool = False
) -> Tensor:
    """``1 - (2 sum p y + s) / (sum p + sum y + s)`` of each class.

    Args:
        probabilities: ``p`` (N, C) of the N positions of a region, in [0, 1].
        labels: ``y`` (N, C), 0 and 1, or between them.
        smooth: ``s``, above 0: a class that is neither there nor predicted costs 0.
        squared: with ``sum p^2 + sum y^2`` in the denominator.

    Returns:
        (C,), in [0, 1].
    """
    return _loss(Counts.of(*_squared(probabilities, labels, squared)), smooth)


def _squared(p: Tensor, y: Tensor, squared: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (p * y, p.square(), y.square()) if squared else (p * y, p, y)


def _loss(counts: Counts, smooth: float) -> Tensor:
    overlap = 2 * counts.both + smooth
    return 1 - overlap / (counts.predicted + counts.labelled + smooth)


class SoftDiceLoss(ConfusionLoss):
    """Adds one minus the overlap of predicted and true regions, by the Dice coefficient.

    Kumar, Guo, Huang, Ren, Liu (2024), SeaBird: Segmentation in Bird's View with Dice Loss Improves
    Monocular 3D Detection of Large Objects, arXiv:2403.20318; first as a loss in Milletari, Navab,
    Ahmadi (2016), V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
    Segmentation, arXiv:1606.04797.

    ``L = 1 - (2 sum p y + s) / (sum p + sum y + s)`` for each class, averaged over classes. A ratio
    of areas: a small region counts as much as a large one, and the mass of background does not
    count at all. For a segment of length l that is predicted with an offset e the loss is
    ``min(|e| / l, 1)``, so that the gradient by the offset shrinks with the size of the object:
    the noise of large objects, which a regression of their position passes on, is damped.

    Value and gradient of ``task="multilabel", over="batch"`` are those of
    abhi1kumar/SeaBird@e26e83e (PanopticBEV/panoptic_bev/algos/semantic_seg.py, ``dice_loss``),
    whose ``s = 1`` is the default. There probabilities are cut off at 0.001 and 0.999 before, and
    each rank has its own batch. ``squared=True`` is the denominator of V-Net. It is commonly
    added to the cross-entropy, as here.

    Args:
        strength: the multiplier, at least 0.
        smooth: ``s``, above 0, in positions.
        squared: squares in the denominator.
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
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if logits and labels do not fit the task.

    Note:
        Over ranks: global. ``"image"``: the mean over the images of all ranks, for a share of the
        one all-reduce of all means. ``"batch"``: the sums of all ranks are added up with
        gradients before the ratio is taken, one all-reduce of 4 C numbers in forward and one in
        backward; under accumulation each micro-batch is a batch of its own. Cost: a softmax
        and a few products over the logits.

        It hurts on images without an object: with a small ``smooth`` any predicted pixel costs
        the whole 1, and ``"batch"`` or ``present_only`` is steadier. To train on it alone return
        ``0.0 * logits.sum()`` as the loss.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SoftDiceLoss
        >>> trainer = L.Trainer(callbacks=[SoftDiceLoss(1.0, classes=[1])], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "SeaBird: Segmentation in Bird's View with Dice Loss Improves Monocular 3D Detection "
            "of Large Objects",
            "Kumar et al.",
            2024,
            "2403.20318",
        ),
        Paper(
            "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation",
            "Milletari et al.",
            2016,
            "1606.04797",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": 'with over="batch" the counts are those of one micro-batch',
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(soft_dice_loss)
    explanation: ClassVar[str] = "adds one minus the overlap of predicted and true regions"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        smooth: float = 1.0,
        squared: bool = False,
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
        check_range(self, "smooth", smooth, 0, low_open=True, cure="SoftDiceLoss(smooth=1.0)")
        self.smooth = smooth
        self.squared = squared

    def terms(self, probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With squares, if asked for."""
        return _squared(probabilities, labels, self.squared)

    def losses(self, counts: Counts) -> Tensor:
        """One minus the coefficient."""
        return _loss(counts, self.smooth)
