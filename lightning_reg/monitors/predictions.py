"""A step's logits and targets, laid out as metrics take them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine.criterion import mixed
from lightning_reg.engine.step import Step


def predictions_of(step: Step, task: str, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Predictions with the classes on dimension 1, and their targets.

    Where techniques have mixed the samples, targets are their shares of classes, which the
    batch, with the class of each first partner, does not say.

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
    if task == "multiclass" and step.mixes and targets.ndim == 1:
        one_hot = F.one_hot(targets.clamp(0, logits.shape[1] - 1), logits.shape[1])
        targets = mixed(step, one_hot.to(logits))
    return (logits, targets) if counted is None else (logits[counted], targets[counted])


def _classes_last(logits: Tensor, targets: Tensor) -> bool:
    """Whether the shapes only fit with the classes on the last dimension (token logits)."""
    first = logits.shape[:1] + logits.shape[2:]
    return targets.shape == logits.shape[:-1] and targets.shape != first
