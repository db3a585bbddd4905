"""Masks over the inputs of a batch, which say where an explanation may or may not lie.

What a technique finds with :func:`read_mask`: a tensor that broadcasts against the inputs, from
an item of the batch or of the dict that ``training_step`` returns, with an error that names the
technique, the place that was looked at, and the line that cures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_reg.engine import MissingSignalError, RegularizationError, Step
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.signals import describe, read_path


def check_mask(owner: object, mask: str) -> None:
    """Raise :class:`ArgumentError` unless ``mask`` names a place."""
    if not isinstance(mask, str) or not mask:
        raise ArgumentError(
            owner,
            f"`mask` must name where the masks are, got {mask!r}",
            cure=f'{type(owner).__name__}(mask="mask")',
        )


def read_mask(owner: object, step: Step, mask: str, inputs: Tensor) -> Tensor:
    """The mask (B, ...) as numbers that broadcast against ``inputs`` (B, ...).

    Args:
        owner: the technique.
        step: the micro-batch.
        mask: a key, position or dotted path in the batch, or ``"outputs.<key>"``.
        inputs: what it is to cover. A mask without the inputs' channel dimension, (B, H, W) for
            (B, C, H, W), covers all channels.
    """
    place, path = (step.outputs, mask[8:]) if mask.startswith("outputs.") else (step.batch, mask)
    try:
        found = read_path(place, path)
    except KeyError as error:
        raise MissingSignalError(
            owner,
            f"needs a mask for each sample at {mask!r} and found none in the first {step.hook}; "
            f"there is {describe(place)}",
            cure=f'{type(owner).__name__}(mask="<a key or position of the batch>")',
        ) from error
    value = torch.as_tensor(found, device=inputs.device)
    value = value.to(inputs.dtype if inputs.is_floating_point() else torch.float32)
    if value.ndim == inputs.ndim - 1 and value.ndim > 1 and value.shape[1:] == inputs.shape[2:]:
        value = value.unsqueeze(1)
    fits = value.ndim == inputs.ndim and all(
        m in (1, n) for m, n in zip(value.shape, inputs.shape, strict=True)
    )
    if not fits:
        raise RegularizationError(
            owner,
            f"needs a mask that fits the inputs {tuple(inputs.shape)}, got {tuple(value.shape)}",
            cure="mask.expand_as(x) in the dataset",
        )
    return value


__all__ = ["check_mask", "read_mask"]
