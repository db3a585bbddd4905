"""Drops connected regions of feature maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.forward_noise import OWN_NOISE, ActivationNoise

__all__ = ["DropBlock", "block_rate", "drop_block"]


def block_rate(p: float, block_size: int, height: int, width: int) -> float:
    """``gamma = p H W / (b^2 (H - b + 1) (W - b + 1))``, the rate of block centres.

    Args:
        p: the share of the map that is to be dropped, were there no overlaps.
        block_size: ``b``, at most the smaller side.
        height: ``H`` of the map.
        width: ``W`` of the map.

    Returns:
        The probability that a place which has room for a block is the centre of one.
    """
    room = (height - block_size + 1) * (width - block_size + 1)
    return p * height * width / (block_size**2 * room)


def drop_block(features: Tensor, seeds: Tensor, block_size: int) -> Tensor:
    """Feature maps without the blocks at ``seeds``, scaled to keep their mean.

    Args:
        features: (B, C, H, W).
        seeds: (B, C, H - b + 1, W - b + 1) bool (C may be 1): True where the upper left corner of
            a dropped block lies.
        block_size: ``b``.

    Returns:
        (B, C, H, W), times the number of places over that of kept ones, of the whole batch.
    """
    # A place is dropped if any seed lies less than a block above and to the left of it.
    spread = F.pad(seeds.to(features.dtype), [block_size - 1] * 4)
    kept = 1 - F.max_pool2d(spread, block_size, stride=1)
    kept = kept.expand_as(features)
    return features * kept * (kept.numel() / kept.sum().clamp_min(1.0))


class DropBlock(ActivationNoise):
    """Drops square blocks of feature maps, in which neighbours would otherwise fill in.

    Ghiasi, Lin, Le (2018), DropBlock: A regularization method for convolutional networks,
    arXiv:1810.12890.

    Each channel draws the corners of its blocks with the rate ``gamma = p H W / (b^2 (H - b + 1)
    (W - b + 1))``, so that about a share ``p`` of the map is dropped (less, where blocks overlap);
    what is kept is divided by the kept share of the batch. The paper raises ``p`` linearly from 0
    to 0.1 over training, with blocks of 7: ``DropBlock(LinearSchedule(0.0, 0.1), ...)``. Formula
    and defaults from the paper's algorithm 1, in agreement with timm's ``drop_block_2d``; not
    checked against the authors' code.

    Args:
        p: the share that is dropped, in [0, 1), or a Schedule; 0 turns the technique off.
        layers: names of submodules that return (B, C, H, W).
        block_size: ``b``, at least 1 (1 is dropout on feature maps); cut to the smaller side of
            the map.
        shared_channels: drop the same places in all channels of a sample.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if a number is outside its range, or a layer is not there.
        RegularizationError: in the first step, if an output is not (B, C, H, W).

    Note:
        In training steps only; a second pass (SAM) sees the same blocks. Over ranks: local, every
        rank draws for its own samples and scales by what it kept. Cost: a draw and a max-pooling
        over each map.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import DropBlock
        >>> technique = DropBlock(0.1, layers="stem", block_size=7)
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "DropBlock: A regularization method for convolutional networks",
            "Ghiasi et al.",
            2018,
            "1810.12890",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = OWN_NOISE
    function: ClassVar[Callable[..., Any] | None] = staticmethod(drop_block)
    explanation: ClassVar[str] = "drops square blocks of feature maps"

    def __init__(
        self,
        p: float | Schedule = 0.1,
        *,
        layers: str | Sequence[str],
        block_size: int = 7,
        shared_channels: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(p, layers=layers, name=name)
        cure = 'DropBlock(0.1, layers="stem", block_size=7)'
        if not isinstance(p, Schedule):
            check_range(self, "p", p, 0, 1, high_open=True, cure=cure)
        check_range(self, "block_size", block_size, 1, cure=cure)
        self.block_size = int(block_size)
        self.shared_channels = shared_channels

    def noisy_output(self, output: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The output without its blocks."""
        if output.ndim != 4:
            raise RegularizationError(
                self,
                f"drops blocks of feature maps (B, C, H, W), got {tuple(output.shape)}",
                cure='FeatureNoise(0.1, layers="...", kind="multiplicative")',
            )
        batch, channels, height, width = output.shape
        size = min(self.block_size, height, width)
        rate = block_rate(strength, size, height, width)
        shape = (
            batch,
            1 if self.shared_channels else channels,
            height - size + 1,
            width - size + 1,
        )
        seeds = torch.rand(shape, generator=generator, device=output.device) < rate
        return drop_block(output, seeds, size)
