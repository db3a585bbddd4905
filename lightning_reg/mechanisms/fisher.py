"""The diagonal of the Fisher information, from the squared gradient of each sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_reg.engine.communicator import Communicator


def squared_gradients(losses: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The sum over samples of the squared gradient of each sample's loss.

    Squaring the gradient of the batch mean instead would lose what cancels between samples: on
    well-fitted data that is nearly all of it.

    Args:
        losses: (B,), negative log-likelihoods with a graph to ``weights``; the samples may share
            statistics of the batch. Costs one backward a sample, and frees the graph.
        weights: what to differentiate by; one that is not reached gets zeros.
    """
    total = [torch.zeros_like(w, requires_grad=False) for w in weights]
    rows = losses.reshape(-1)
    for i, loss in enumerate(rows.unbind()):
        found = torch.autograd.grad(
            loss, weights, retain_graph=i + 1 < len(rows), materialize_grads=True
        )
        torch._foreach_addcmul_(total, list(found), list(found))
    return total


def diagonal_fisher(
    losses: Iterable[Tensor],
    weights: Sequence[Tensor],
    comm: Communicator,
    samples: int | None = None,
) -> list[Tensor]:
    """The mean over the samples of all ranks of the squared gradient of each sample's loss.

    Args:
        losses: (B,) of one batch after the other, each computed when it is asked for.
        weights: what to differentiate by.
        comm: the ranks; they may have different numbers of batches.
        samples: the most that this rank takes part with; ``None`` takes all.

    Returns:
        One tensor a weight; zeros if there is no sample at all.
    """
    total = [torch.zeros_like(w, requires_grad=False) for w in weights]
    count = 0
    for batch in losses:
        rows = batch.reshape(-1)
        rows = rows if samples is None else rows[: samples - count]
        torch._foreach_add_(total, squared_gradients(rows, weights))
        count += len(rows)
        if samples is not None and count >= samples:
            break
    number = torch.tensor([float(count)], dtype=total[0].dtype, device=total[0].device)
    flat = comm.reduce(torch.cat([*[t.reshape(-1) for t in total], number]))
    parts = (flat[:-1] / flat[-1].clamp_min(1)).split([t.numel() for t in total])
    return [part.view_as(t) for part, t in zip(parts, total, strict=True)]


__all__ = ["diagonal_fisher", "squared_gradients"]
