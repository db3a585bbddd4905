"""Some samples of a batch, whatever its layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_reg.engine.errors import UnsupportedError


def batch_size(batch: Any) -> int:
    """The length of the first tensor in a batch."""
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise UnsupportedError(
        "lightning_reg",
        f"takes some samples out of a batch, and finds no tensor in it, only {type(batch)}",
    )


def take_rows(batch: Any, rows: Tensor, size: int) -> Any:
    """The batch with the entries ``rows`` of every tensor and list that has one a sample.

    Args:
        batch: tensors, mappings, tuples and lists, nested.
        rows: (n,) positions.
        size: the number of samples.
    """
    if isinstance(batch, Tensor):
        return batch[rows.to(batch.device)] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        kept = {key: take_rows(value, rows, size) for key, value in batch.items()}
        return kept if type(batch) is dict else type(batch)(kept)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(take_rows(value, rows, size) for value in batch))
    if isinstance(batch, list) and len(batch) == size and not any(map(_is_nested, batch)):
        return [batch[i] for i in rows.tolist()]
    if isinstance(batch, (list, tuple)):
        return type(batch)(take_rows(value, rows, size) for value in batch)
    return batch


def _is_nested(value: Any) -> bool:
    """A tensor in a list may be one of the batch's fields; a number or text is one sample's."""
    return isinstance(value, (Tensor, Mapping, list, tuple))


def _leaves(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return [leaf for value in batch.values() for leaf in _leaves(value)]
    if isinstance(batch, (list, tuple)):
        return [leaf for value in batch for leaf in _leaves(value)]
    return [batch]


__all__ = ["batch_size", "take_rows"]
