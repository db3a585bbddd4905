"""The diagonal of the Fisher information, from the squared gradient of each sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


__all__ = ["squared_gradients"]
