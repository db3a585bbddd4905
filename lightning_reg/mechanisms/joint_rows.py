"""Rows of several tensors of all ranks, with gradients, for the price of one gather."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_reg.engine.communicator import Communicator


def joint_rows(comm: Communicator, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What belongs to the samples of all ranks, each sample's numbers in one row of all tensors.

    Args:
        comm: the ranks.
        tensors: (B, ...) floats.

    Returns:
        The positions (B,) of this rank's samples among all N, and the tensors (N, ...).
    """
    first = tensors[0]
    if comm.world_size == 1:
        return torch.arange(len(first), device=first.device), list(tensors)
    rank = first.new_full((len(first), 1), comm.rank)
    columns = [rank, *(tensor.flatten(1).to(rank) for tensor in tensors)]
    rows = comm.gather(torch.cat(columns, 1))
    origin, *joint = rows.split([column.shape[1] for column in columns], 1)
    mine = (origin[:, 0].detach() == comm.rank).nonzero()[:, 0]
    return mine, [j.unflatten(1, t.shape[1:]) for j, t in zip(joint, tensors, strict=True)]


__all__ = ["joint_rows"]
