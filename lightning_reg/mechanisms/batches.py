"""Matrices of one shape at a time, so that one batched kernel serves all layers of that shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Kernel = Callable[[Tensor], tuple[Tensor, Tensor]]


def in_batches(matrices: Sequence[Tensor], kernel: Kernel) -> tuple[Tensor, list[Tensor]]:
    """A value (N,) and a result for each of N matrices.

    Args:
        matrices: of any shapes; those of one shape are stacked.
        kernel: gives values (K,) and results (K, ...) of a stack (K, rows, columns).
    """
    values: list[Tensor] = [torch.empty(0)] * len(matrices)
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    for places in by_shape(matrices):
        # A layer that is alone in its shape, as large ones often are, needs no copy.
        stack = (
            torch.stack([matrices[i] for i in places])
            if len(places) > 1
            else matrices[places[0]].unsqueeze(0)
        )
        found = kernel(stack)
        for i, value, result in zip(places, found[0].unbind(), found[1].unbind(), strict=True):
            values[i], results[i] = value, result
    return torch.stack(values), results


def svd(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition; NaN, not an error, where a matrix is not finite.

    Args:
        stack: (..., rows, columns).
    """
    broken = ~stack.isfinite().all(-1).all(-1)
    held = torch.where(broken[..., None, None], 0.0, stack)
    left, values, right = torch.linalg.svd(held, full_matrices=False)
    return left, torch.where(broken[..., None], torch.nan, values), right


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors that share shape, type and device."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(i)
    return list(groups.values())


__all__ = ["by_shape", "in_batches", "svd"]
