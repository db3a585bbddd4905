"""Collectives over all ranks, through which gradients flow as the joint batch would have them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_reg.engine.carry import carry

Reduction = Literal["sum", "mean", "min", "max"]


@dataclass(frozen=True)
class JointMean:
    """A rank's part of a mean over the samples of all ranks, each counting once.

    A penalty that returns one waits for those of all other techniques: one collective brings all
    of them together (:meth:`Communicator.means`).

    Attributes:
        total: the sum over this rank's samples, with gradients.
        count: the number of them, or the sum of their weights.
        fixed: whether the count is a fact of the batch, whatever the model makes of it: a second
            pass over the batch then needs no collective. The same on all ranks.
    """

    total: Tensor
    count: Tensor
    fixed: bool = False

    @classmethod
    def of(
        cls, values: Tensor, weights: Tensor | None = None, *, fixed: bool | None = None
    ) -> JointMean:
        """The part of values (B,) with weights (B,) from 0, a mask for example; B may be 0.

        Args:
            values: one a sample.
            weights: of the samples; all 1 by default.
            fixed: whether the weights come from the batch alone; by default where there are none.
        """
        fixed = weights is None if fixed is None else fixed
        weights = torch.ones_like(values) if weights is None else weights.to(values)
        return cls((values * weights).sum(), weights.detach().sum(), fixed)


class Communicator:
    """All ranks of a run; with one process every method returns its argument.

    Values that enter a loss on every rank come out with gradients such that the *mean* over
    ranks, which DDP takes, is the gradient of the same loss on the joined batch: collectives sum
    in backward. Every rank has to make the same calls in the same order.

    Args:
        rank: this process, from 0.
        world_size: the number of processes.
        group: the process group; ``None`` is the default group.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.group = group
        self._room: dict[tuple[torch.dtype, tuple[int, ...]], int] = {}

    @classmethod
    def of(cls, trainer: Any) -> Communicator:
        """The ranks of a Trainer, or of this process if it belongs to no group."""
        if dist.is_available() and dist.is_initialized() and trainer.world_size > 1:
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks, by rank (rank 0's first); ranks may have different numbers.

        One collective, and one in backward: the price of whatever is not a mean or a sum over
        samples. A second one goes round when a rank has more rows of this kind than any had before,
        as in the first step.

        Args:
            tensor: (B, ...); gradients flow back to it from every rank's loss.
        """
        if self.world_size == 1:
            return tensor
        rows: Tensor = _Gather.apply(tensor, self)  # type: ignore[no-untyped-call]
        return rows

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each rank, without gradients; see :meth:`gather`."""
        kind = (tensor.dtype, tuple(tensor.shape[1:]))
        # Every rank knows the same number: it comes from what all of them have received.
        room = self._room.get(kind, 1)
        sizes, received = self._exchange(tensor[:room], len(tensor), room)
        self._room[kind] = max(room, *sizes)
        if max(sizes) > room:
            _, received = self._exchange(tensor, len(tensor), max(sizes))
        return [rows[:size] for rows, size in zip(received, sizes, strict=True)]

    def stack(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks (R, ...), by rank; of one shape on all ranks. No gradient.

        Where the shape is known to be the same it needs no host sync, unlike :meth:`gather_rows`.
        """
        own = tensor.detach().contiguous()
        if self.world_size == 1:
            return own.unsqueeze(0)
        received = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(received, own, group=self.group)
        return torch.stack(received)

    def reduce(self, tensor: Tensor, op: Reduction = "sum") -> Tensor:
        """The sum, mean, minimum or maximum over ranks, of a tensor of one shape on all ranks.

        Gradients flow through ``"sum"`` and ``"mean"``, by one more collective in backward.
        """
        if self.world_size == 1:
            return tensor
        if op in ("min", "max"):
            result = tensor.detach().clone()
            kind = dist.ReduceOp.MIN if op == "min" else dist.ReduceOp.MAX
            dist.all_reduce(result, kind, group=self.group)
            return result
        total: Tensor = _Sum.apply(tensor, self.group)  # type: ignore[no-untyped-call]
        return torch.div(total, self.world_size) if op == "mean" else total

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean of all ranks' values, each sample counting once however they are spread.

        A rank without samples takes part with nothing; without any sample the mean is 0. What
        becomes of the mean has to be the same on all ranks.

        Args:
            values: (B,).
            weights: (B,) non-negative; a mask as numbers, for example.
        """
        return self.means([JointMean.of(values, weights)])[0]

    def means(self, parts: Sequence[JointMean]) -> list[Tensor]:
        """Several means by one collective in forward and none in backward.

        A rank's sum over the joint number of samples, times the number of ranks, has the gradient
        that DDP's mean makes the joint one; only the value has to come from all ranks.
        """
        return self.means_and_counts(parts)[0]

    def means_and_counts(self, parts: Sequence[JointMean]) -> tuple[list[Tensor], list[Tensor]]:
        """The :meth:`means`, and how many samples, or what weights of them, each is over."""
        if self.world_size == 1 or not parts:
            counts = [part.count for part in parts]
            return self.shares(parts, counts), counts
        numbers = [number.detach() for part in parts for number in (part.total, part.count)]
        dtype = max((n.dtype for n in numbers), key=lambda kind: torch.finfo(kind).bits)
        joint = self.reduce(torch.stack([number.to(dtype) for number in numbers]))
        totals, sizes = joint.view(-1, 2).unbind(1)
        values, counts = totals / _positive(sizes), list(sizes)
        shares = self.shares(parts, counts)
        means = [
            carry(value.to(share.dtype), share) for value, share in zip(values, shares, strict=True)
        ]
        return means, counts

    def shares(self, parts: Sequence[JointMean], counts: Sequence[Tensor]) -> list[Tensor]:
        """This rank's shares in means of known counts, without a collective.

        They have the gradients of the :meth:`means`; the mean of their values over ranks is the
        joint mean.

        Args:
            parts: of this rank.
            counts: joint ones, of :meth:`means_and_counts`.
        """
        if self.world_size == 1:
            return [p.total / _positive(count) for p, count in zip(parts, counts, strict=True)]
        return [
            part.total * (self.world_size / _positive(count)).to(part.total.dtype)
            for part, count in zip(parts, counts, strict=True)
        ]

    def any(self, flag: Tensor | bool) -> bool:
        """Whether the flag is set on any rank; a host sync."""
        if self.world_size == 1:
            return bool(flag)
        raised = torch.as_tensor(flag, device=self._device(flag)).to(torch.int32).clone()
        return bool(self.reduce(raised, "max"))

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of one rank; shapes have to agree. No gradient."""
        if self.world_size == 1:
            return tensor
        result = tensor.detach().clone()
        dist.broadcast(result, source, group=self.group)
        return result

    def shard(self, costs: Sequence[float]) -> list[int]:
        """This rank's share of items, balanced by cost: the longest first, to the least loaded.

        Every item belongs to exactly one rank; all ranks agree without communication.
        """
        loads = [(0.0, rank) for rank in range(self.world_size)]
        shares: list[list[int]] = [[] for _ in loads]
        for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            load, rank = heapq.heappop(loads)
            shares[rank].append(item)
            heapq.heappush(loads, (load + costs[item], rank))
        return sorted(shares[self.rank])

    def _exchange(self, rows: Tensor, size: int, room: int) -> tuple[list[int], list[Tensor]]:
        """The number of rows of each rank, and the first of them, by one collective.

        Bytes, so that the number fits beside rows of any type.
        """
        own = rows.new_zeros((room, *rows.shape[1:]))
        own[: len(rows)] = rows.detach()
        header = torch.tensor([size], dtype=torch.int64, device=rows.device).view(torch.uint8)
        message = torch.cat([header, own.view(-1).view(torch.uint8)])
        messages = [torch.empty_like(message) for _ in range(self.world_size)]
        dist.all_gather(messages, message, group=self.group)
        sizes = torch.stack([m[: len(header)] for m in messages]).view(torch.int64).flatten()
        # A copy: rows of wide types may not begin in the middle of a message.
        parts = [m[len(header) :].clone().view(rows.dtype).view(own.shape) for m in messages]
        return sizes.tolist(), parts

    def _device(self, flag: Tensor | bool) -> torch.device:
        if isinstance(flag, Tensor):
            return flag.device
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")


def gather_together(gather: Callable[[Tensor], Tensor], *tensors: Tensor) -> list[Tensor]:
    """The rows of several tensors for the price of one gather, without gradients.

    Args:
        gather: brings the rows of all ranks together.
        tensors: as many rows (B, ...) each, of any types.
    """
    rows = [t.detach().reshape(len(t), math.prod(t.shape[1:])) for t in tensors]
    parts = [row.contiguous().view(torch.uint8) for row in rows]
    joint = gather(torch.cat(parts, 1)).split([part.shape[1] for part in parts], 1)
    return [
        part.contiguous().view(t.dtype).reshape(-1, *t.shape[1:])
        for part, t in zip(joint, tensors, strict=True)
    ]


def _positive(count: Tensor) -> Tensor:
    # Not a tiny number: where all weights are 0, its inverse overflows in the gradient to NaN.
    return count.where(count > 0, torch.ones_like(count))


class _Gather(torch.autograd.Function):
    """All-gather of rows; the backward sums what every rank's loss says of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, comm: Communicator) -> Tensor:
        parts = comm.gather_rows(tensor)
        sizes = [len(part) for part in parts]
        first = sum(sizes[: comm.rank])
        ctx.own, ctx.group = slice(first, first + len(tensor)), comm.group
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.own], None


class _Sum(torch.autograd.Function):
    """All-reduce; its own transpose."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.detach().contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
