"""A step's logits and targets, laid out as metrics take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.sampler import padding_mask
from lightning_reg.engine.step import Step


def predictions_of(step: Step, task: str, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Predictions with the classes on dimension 1, and their targets.

    Args:
        step: the user's step.
        task: ``"multiclass"``: logits (B, C, ...), or (B, ..., C) where only that fits the
            targets; ``"binary"``: (B, ...), or (B, ..., 1).
        counted: (B,) False for samples that are left out; ``None`` if all count.
    """
    logits, targets = step.logits.detach(), torch.as_tensor(step.targets)
    if task == "binary" and logits.ndim == targets.ndim + 1 and logits.shape[-1] == 1:
        logits = logits.squeeze(-1)
    if task == "multiclass" and _classes_last(logits, targets):
        logits = logits.movedim(-1, 1)
    return (logits, targets) if counted is None else (logits[counted], targets[counted])


def _classes_last(logits: Tensor, targets: Tensor) -> bool:
    """Whether the shapes only fit with the classes on the last dimension (token logits)."""
    first = logits.shape[:1] + logits.shape[2:]
    return targets.shape == logits.shape[:-1] and targets.shape != first


def counted_rows(step: Step, loader: Any) -> Tensor | None:
    """False for samples that a DistributedSampler repeats; ``None`` if all count."""
    logits = step.logits
    repeated = padding_mask(loader, step.batch_idx, len(logits), logits.device)
    return None if repeated is None else ~repeated
