"""Which samples of a batch are only there to make the ranks' shares equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def padding_mask(loader: Any, batch_idx: int, size: int, device: torch.device) -> Tensor | None:
    """True where a DistributedSampler repeated a sample at the end of the epoch.

    Args:
        loader: the training dataloader.
        batch_idx: the batch's position in this rank's epoch.
        size: the number of samples in this rank's batch.
        device: where the mask goes.

    Returns:
        A mask (size,), or ``None`` if the sampler repeats nothing.
    """
    sampler = getattr(loader, "sampler", None)
    names = ("num_replicas", "rank", "total_size", "dataset")
    if not all(hasattr(sampler, name) for name in names):
        return None
    length = len(sampler.dataset)  # type: ignore[union-attr]
    if sampler.total_size <= length:  # type: ignore[union-attr]
        return None
    # Rank r holds positions r, r + W, r + 2W, ... of the epoch's order; repeats come last.
    first = batch_idx * (getattr(loader, "batch_size", None) or size)
    local = torch.arange(first, first + size, device=device)
    return local * sampler.num_replicas + sampler.rank >= length  # type: ignore[union-attr,no-any-return]
