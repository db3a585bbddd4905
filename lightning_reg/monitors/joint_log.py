"""The log of numbers that all ranks hold already."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor


def log_joint(module: pl.LightningModule, key: str, value: Tensor) -> None:
    """Log a number that all ranks hold already, without a collective."""
    # With `rank_zero_only` Lightning reduces nothing and does not ask for it either; each rank
    # keeps what it has, so that every callback finds the number.
    module.log(
        key,
        value.float(),
        batch_size=1,
        sync_dist=True,
        rank_zero_only=True,
        reduce_fx="max",
        add_dataloader_idx=False,
    )


__all__ = ["log_joint"]
