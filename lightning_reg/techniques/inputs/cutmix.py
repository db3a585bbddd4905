"""Pastes a box of another image into each image, and mixes the labels by area."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.batch_transform import (
    BatchTransform,
    Per,
    Replaces,
    Transformed,
    box_areas,
    box_masks,
    clipped_boxes,
    draw_beta,
    draw_centres,
    draw_permutation,
)

__all__ = ["CutMix", "cutmix"]


def cutmix(inputs: Tensor, permutation: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Images with a box of their partner, and the share of each image that is its own.

    ``x~_i = M_i x_i + (1 - M_i) x_j`` with ``j = permutation[i]`` and ``M_i`` 0 in the box, 1
    elsewhere; ``lam_i = 1 - area(box_i) / (H W)``.

    Args:
        inputs: (B, C, ..., H, W).
        permutation: (B,), the partner of each image.
        boxes: (B, 4), or (1, 4) for one box in all images: (top, left, bottom, right), the ends
            excluded, inside the image. One box on the CPU is cut without a mask.

    Returns:
        The images, and ``lam`` (B,) or (1,) in float32 on the device of ``boxes``.
    """
    height, width = inputs.shape[-2:]
    lam = 1 - box_areas(boxes).double() / (height * width)
    if len(boxes) == 1 and boxes.device.type == "cpu":
        top, left, bottom, right = boxes[0].tolist()
        mixed = inputs.clone()
        mixed[..., top:bottom, left:right] = inputs[..., top:bottom, left:right][permutation]
    else:
        inside = box_masks(boxes.to(inputs.device), height, width)
        inside = inside.view(len(boxes), *[1] * (inputs.ndim - 3), height, width)
        mixed = torch.where(inside, inputs[permutation], inputs)
    return mixed, lam.float()


def boxes_of(lam: Tensor, centres: Tensor, height: int, width: int) -> Tensor:
    """Boxes (B, 4) of ``sqrt(1 - lam)`` of both sides around ``centres``, cut off at the borders.

    Args:
        lam: (B,), the share that would be kept if nothing were cut off.
        centres: (B, 2), pixels as (row, column).
        height: of the images.
        width: of the images.
    """
    sides = (1 - lam).sqrt()[:, None] * torch.tensor([height, width], device=lam.device)
    half = sides.long() // 2
    return clipped_boxes(centres, half, half, height, width)


class CutMix(BatchTransform):
    """Trains on images with a box of another image, labels mixed by the area of the box.

    Yun, Han, Oh, Chun, Choe, Yoo (2019), CutMix: Regularization Strategy to Train Strong
    Classifiers with Localizable Features, arXiv:1905.04899.

    ``lam_0 ~ Beta(alpha, alpha)``; a box of ``sqrt(1 - lam_0)`` of the height and of the width
    lies around a pixel that is drawn evenly, and is cut off at the borders. Then
    ``x~ = M x_i + (1 - M) x_j`` and ``y~ = lam y_i + (1 - lam) y_j`` with
    ``lam = 1 - area / (H W)`` of the box that is left. Checked against the official code
    (clovaai/CutMix-PyTorch, ``train.py``) and as there: sides are rounded down, and a side of an
    odd number of pixels loses one more. So with ``alpha=1`` ``lam`` has a mean of 0.679 and not
    of 0.5, and of 0.70 on 32 x 32 pixels, where rounding takes more. Defaults of that code:
    ``alpha=1``; probability 0.5 on CIFAR, 1 on ImageNet. One box serves the whole batch there,
    as here; ``per="sample"`` draws one for each image.

    What happens to labels: class indices stay in the batch, so that a metric which your step
    updates with them goes on counting whole labels (against the label of the image around the
    box). The loss that is differentiated is the cross-entropy of the logits of your step with
    the mixed labels; the loss that you log is your own. Float targets are mixed in the batch,
    and your own loss is used.

    Args:
        alpha: of the Beta distribution, above 0; 1 draws the area evenly, a small one draws
            boxes that are nothing or everything.
        probability: of mixing a batch, or an image with ``per="sample"``: a number in [0, 1] or
            a :class:`Schedule`; 0 turns the technique off.
        per: ``"batch"`` for one box a batch, ``"sample"`` for one an image.
        replaces: for class indices: ``"cross_entropy"`` if your loss is the cross-entropy of
            logits and labels (checked in the first step), ``"term"`` if it has other terms,
            which are kept, ``"loss"`` to drop it.
        signals: where ``inputs``, ``targets`` and (for class indices) ``logits`` are.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if ``alpha`` or ``probability`` is outside its range.
        RegularizationError: in the first step, if the inputs are not images (B, C, H, W) of
            floats (videos (B, C, T, H, W) get the same box in each frame), if your loss is not
            the cross-entropy of the logits and labels that were found, or if there is a label
            per pixel: labels of a segmentation would have to be cut as the images are.

    Note:
        Over ranks: local; partners are of the same rank, and each rank draws its own boxes. No
        collective. Under accumulation each micro-batch is cut by itself. A second pass (SAM)
        sees the same images. Cost: a copy of the inputs, and the cross-entropy once more.

        ``reg/cut_mix`` logs the mean of ``1 - lam``, the share of labels that was given away.

        It hurts where the label hangs on a detail or on the position in the image (the box may
        hide the one or show another), and in short trainings.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import CutMix
        >>> trainer = L.Trainer(callbacks=[CutMix(alpha=1.0, probability=0.5)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
            "Yun et al.",
            2019,
            "1905.04899",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(cutmix)
    image: ClassVar[bool] = True
    explanation: ClassVar[str] = (
        "pastes boxes of other images; class indices stay in the batch for your metrics, and the "
        "loss is the cross-entropy of the captured logits with labels mixed by area; float "
        "targets are mixed in the batch"
    )

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        probability: float | Schedule = 1.0,
        per: Per = "batch",
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(probability, per=per, replaces=replaces, signals=signals, name=name)
        check_range(self, "alpha", alpha, 0, low_open=True, cure="CutMix(alpha=1.0)")
        self.alpha = alpha

    def transform(
        self, inputs: Tensor, chosen: Tensor, generator: torch.Generator, step: Step
    ) -> Transformed:
        """Paste boxes into the chosen images."""
        height, width = inputs.shape[-2:]
        count = len(inputs) if self.per == "sample" else 1
        drawn = draw_beta(self.alpha, count, generator)
        # An image that is not chosen gets an empty box.
        share = torch.where(chosen[:count], drawn, 1.0)
        centres = draw_centres((count,), height, width, generator)
        boxes = boxes_of(share, centres, height, width)
        permutation = draw_permutation(len(inputs), generator).to(inputs.device)
        mixed, lam = cutmix(inputs, permutation, boxes)
        keeps = lam.to(inputs.device).expand(len(inputs))
        return Transformed(mixed, 1 - float(lam.mean()), permutation, keeps)
