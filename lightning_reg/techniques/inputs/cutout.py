"""Masks random squares of each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.batch_transform import (
    BatchTransform,
    Transformed,
    box_masks,
    clipped_boxes,
    draw_centres,
)

__all__ = ["Cutout", "cutout"]


def cutout(inputs: Tensor, centres: Tensor, length: int, fill: float = 0.0) -> Tensor:
    """Images with squares of ``length`` around ``centres`` set to ``fill`` in all channels.

    A square covers ``[c - length // 2, c - length // 2 + length)`` of rows and of columns, cut
    off at the borders.

    Args:
        inputs: (B, C, ..., H, W).
        centres: (B, K, 2), K pixels an image as (row, column); K may be 0.
        length: the side of a square in pixels.
        fill: the value inside.

    Returns:
        (B, C, ..., H, W).
    """
    height, width = inputs.shape[-2:]
    before = length // 2
    boxes = clipped_boxes(centres, before, length - before, height, width)
    inside = box_masks(boxes, height, width).any(1)
    inside = inside.view(len(inputs), *[1] * (inputs.ndim - 3), height, width)
    return inputs.masked_fill(inside, fill)


class Cutout(BatchTransform):
    """Masks a square of each image, around a pixel that is drawn evenly.

    DeVries, Taylor (2017), Improved Regularization of Convolutional Neural Networks with Cutout,
    arXiv:1708.04552.

    The centre may be any pixel, so that squares are often cut off by the border: the paper found
    that to matter. With an ``H x H`` image and a square of ``L`` the expected masked share is
    ``(mean overlap / H)^2``, 0.191 for ``H=32, L=16``, and not ``(L/H)^2 = 0.25``. Checked
    against the official code (uoguelph-mlrg/Cutout, ``util/cutout.py``); there a square of an
    odd length loses a pixel, here it does not. The paper's lengths: 16 for CIFAR-10, 8 for
    CIFAR-100, 20 for SVHN, one hole each.

    Args:
        length: the side of a square in pixels, from 1.
        holes: squares an image; they may overlap.
        probability: of masking an image: a number in [0, 1] or a :class:`Schedule`; 0 turns the
            technique off. Default 1, as in the paper.
        fill: the value inside. 0 is the mean of images that are normalized before they come to
            the batch; where they are not, give their mean.
        signals: where ``inputs`` are.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if the inputs are not images (B, C, H, W) of
            floats.

    Note:
        Over ranks: local; each rank draws its own squares. No collective. Under accumulation
        each micro-batch draws its own. A second pass (SAM) sees the same images. Labels stay as
        they are, and so does your loss. Cost: a mask over the pixels and a copy of the inputs.

        ``reg/cutout`` logs the share of pixels that was masked.

        It hurts where squares are large enough to hide the object (the best length falls with
        the number of classes), and on images that are small or full of detail.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import Cutout
        >>> trainer = L.Trainer(callbacks=[Cutout(length=16)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Improved Regularization of Convolutional Neural Networks with Cutout",
            "DeVries and Taylor",
            2017,
            "1708.04552",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    reads: ClassVar[frozenset[str]] = frozenset({"inputs"})
    writes: ClassVar[frozenset[str]] = frozenset({"inputs"})
    exclusive: ClassVar[frozenset[str]] = frozenset()
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch draws its own squares",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(cutout)
    image: ClassVar[bool] = True
    explanation: ClassVar[str] = "masks squares of the images; labels and loss are yours"

    def __init__(
        self,
        length: int = 16,
        *,
        holes: int = 1,
        probability: float | Schedule = 1.0,
        fill: float = 0.0,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(probability, per="sample", signals=signals, name=name)
        for argument, value in (("length", length), ("holes", holes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(
                    self,
                    f"`{argument}` must be a whole number from 1, got {value!r}",
                    cure="Cutout(length=16, holes=1)",
                )
        check_range(self, "fill", fill, cure="Cutout(fill=0.0)")
        self.length = length
        self.holes = holes
        self.fill = fill

    def transform(
        self, inputs: Tensor, chosen: Tensor, generator: torch.Generator, step: Step
    ) -> Transformed:
        """Mask squares of the chosen images."""
        height, width = inputs.shape[-2:]
        centres = draw_centres((len(inputs), self.holes), height, width, generator)
        # Far outside the image a square masks nothing.
        centres = torch.where(chosen[:, None, None], centres, -2 * self.length)
        share = self._masked_share(centres, height, width)
        masked = cutout(inputs, centres.to(inputs.device), self.length, self.fill)
        return Transformed(masked, share)

    def _masked_share(self, centres: Tensor, height: int, width: int) -> float:
        ones = torch.ones(len(centres), 1, height, width)
        return 1 - float(cutout(ones, centres, self.length).mean())
