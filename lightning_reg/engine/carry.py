"""A loss that shows one value and has the gradients of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def carry(
    value: Tensor,
    loss: Tensor,
    gradients: Sequence[Tensor | None] = (),
    weights: Sequence[Tensor] = (),
) -> Tensor:
    """``value``, whose backward goes on to ``loss`` and hands ``gradients`` to ``weights``.

    Args:
        value: what the result shows.
        loss: what is differentiated in its place.
        gradients: one a weight, of its shape; multiplied by what comes back to the value.
            ``None`` reaches the weight with no gradient.
        weights: leaves of the graph.
    """
    result: Tensor = _Carry.apply(value, loss, gradients, *weights)  # type: ignore[no-untyped-call]
    return result


class _Carry(torch.autograd.Function):
    """See :func:`carry`."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        loss: Tensor,
        gradients: Sequence[Tensor | None],
        *weights: Tensor,
    ) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        present = [g for g in ctx.gradients if g is not None]
        scaled = iter(torch._foreach_mul(present, grad) if present else ())
        parts = [None if g is None else next(scaled) for g in ctx.gradients]
        return None, grad, None, *parts


__all__ = ["carry"]
