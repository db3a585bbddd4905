"""Lists of tensors, one a weight, of which some may be missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_reg.engine.step import RunContext


def sum_into(total: list[Tensor | None], part: list[Tensor | None]) -> list[Tensor | None]:
    """Add in place to ``total``, which starts as a copy: autograd may hand out one tensor twice."""
    total = total or [None] * len(part)
    pairs = list(zip(total, part, strict=True))
    both = [(t, p) for t, p in pairs if t is not None and p is not None]
    if both:
        torch._foreach_add_([t for t, _ in both], [p for _, p in both])
    return [p.clone() if t is None and p is not None else t for t, p in pairs]


def filled(weights: Sequence[Tensor], gradients: list[Tensor | None]) -> list[Tensor]:
    """Zeros for weights that the loss does not reach."""
    pairs = zip(weights, gradients, strict=True)
    return [torch.zeros_like(w, requires_grad=False) if g is None else g for w, g in pairs]


def mean_over_ranks(step: RunContext, tensors: list[Tensor]) -> list[Tensor]:
    """One collective for all tensors, in float32 at least."""
    if step.comm.world_size == 1:
        return tensors
    flat = torch.cat([t.reshape(-1) for t in tensors])
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    flat = step.comm.reduce(flat, "mean")
    parts = flat.split([t.numel() for t in tensors])
    return [p.view_as(t).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]


__all__ = ["filled", "mean_over_ranks", "sum_into"]
