"""Large tensors in blocks, so that no temporary is as large as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_reg.metrics.inputs import block_size


def split_alike(
    tensors: Sequence[Tensor], positions: int, limit: int | None = None
) -> Iterator[list[Tensor]]:
    """Views of tensors that share their first dimensions, block by block.

    A block holds at most ``limit`` numbers of the first tensor, or one position if that alone has
    more. Only views are made: strides may be anything, also those of an expanded tensor.

    Args:
        tensors: their first ``positions`` dimensions are the same.
        positions: how many dimensions may be cut.
        limit: numbers of the first tensor in a block; what fits into a processor's cache, or
            more on other devices, by default.
    """
    if limit is None:
        limit = block_size(tensors[0])
    sizes = tensors[0].shape[:positions]
    if tensors[0].numel() <= limit or max(sizes, default=1) == 1:
        yield list(tensors)
        return
    dim = max(range(positions), key=lambda d: sizes[d])
    step = max(1, limit * sizes[dim] // tensors[0].numel())
    for parts in zip(*(t.split(step, dim) for t in tensors), strict=True):
        yield from split_alike(parts, positions, limit)
