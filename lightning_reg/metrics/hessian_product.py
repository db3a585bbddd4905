"""Products of the Hessian of a mean loss with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError

Loss = Tensor | Callable[[], Tensor]
OWNER = "Hessian"


class HessianProduct:
    """Products ``H v`` with the Hessian of the mean loss over batches and ranks.

    Args:
        losses: one for each batch of this rank: a scalar with its graph, or what computes one.
            A single loss keeps its graph between products; of several, each is computed again.
        parameters: what the loss is differentiated by.
        weights: how much each batch counts, its number of samples for example; default: alike.
        comm: the other ranks; every rank asks for the same products.
    """

    def __init__(
        self,
        losses: Loss | Sequence[Loss],
        parameters: Sequence[Tensor],
        *,
        weights: Sequence[float] | None = None,
        comm: Communicator | None = None,
    ) -> None:
        several = isinstance(losses, Sequence)
        self._losses: Sequence[Loss] = losses if several else [losses]  # type: ignore[assignment, list-item]
        self._weights = [1.0] * len(self._losses) if weights is None else list(weights)
        if len(self._weights) != len(self._losses):
            raise ArgumentError(
                OWNER,
                f"{len(self._losses)} losses have {len(self._weights)} weights",
                cure="weights=[len(batch) for batch in batches]",
            )
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ArgumentError(
                OWNER,
                "none of the parameters learns",
                cure="hessian_trace(loss, list(module.parameters()))",
            )
        self.comm = comm if comm is not None else Communicator()
        self._kept: list[Tensor | None] | None = None
        self._total: Tensor | None = None

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters)

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers that are the same on all ranks."""
        return torch.Generator(self.parameters[0].device).manual_seed(seed)

    def __call__(self, vectors: Tensor) -> Tensor:
        """``H v`` (m, P) for the rows of ``vectors`` (m, P), in their type."""
        total = torch.zeros_like(vectors)
        for gradients, weight in self._gradients():
            for row, vector in zip(total, vectors, strict=True):
                row.add_(self._product(gradients, vector), alpha=weight)
        total = self.comm.reduce(total)
        return total / self._total_weight().to(total)

    def _total_weight(self) -> Tensor:
        if self._total is None:
            own = torch.tensor(math.fsum(self._weights), dtype=torch.float64)
            self._total = self.comm.reduce(own.to(self._sum_type()).to(self.parameters[0].device))
        return self._total

    def _sum_type(self) -> torch.dtype:
        # MPS has no float64.
        return torch.float32 if self.parameters[0].device.type == "mps" else torch.float64

    def _gradients(self) -> Iterator[tuple[list[Tensor | None], float]]:
        if len(self._losses) == 1:
            if self._kept is None:
                self._kept = _first_gradients(self._losses[0], self.parameters)
            yield self._kept, self._weights[0]
            return
        for loss, weight in zip(self._losses, self._weights, strict=True):
            yield _first_gradients(loss, self.parameters), weight

    def _product(self, gradients: list[Tensor | None], vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in self.parameters])
        pairs = [
            (g, part.view_as(p).to(p.dtype))
            for g, part, p in zip(gradients, parts, self.parameters, strict=True)
            if g is not None and g.requires_grad
        ]
        if not pairs:
            # The loss is linear in its parameters.
            return torch.zeros_like(vector)
        reached, directions = zip(*pairs, strict=True)
        with _plain_kernels():
            found = torch.autograd.grad(
                reached, self.parameters, directions, retain_graph=True, allow_unused=True
            )
        filled = [
            torch.zeros_like(p) if f is None else f
            for f, p in zip(found, self.parameters, strict=True)
        ]
        return torch.cat([f.detach().reshape(-1) for f in filled]).to(vector.dtype)


def draw_probes(
    product: HessianProduct, count: int, distribution: str, generator: torch.Generator
) -> Tensor:
    """Random vectors (count, P) with uncorrelated entries of variance 1."""
    shape, first = (count, product.size), product.parameters[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    if distribution == "gaussian":
        return torch.randn(shape, generator=generator, device=first.device, dtype=dtype)
    bits = torch.randint(0, 2, shape, generator=generator, device=first.device)
    return (2 * bits - 1).to(dtype)


def dot(one: Tensor, other: Tensor) -> Tensor:
    """In float64, but for MPS, which has none."""
    kind = torch.float32 if one.device.type == "mps" else torch.float64
    return (one.to(kind) * other.to(kind)).sum()


def _first_gradients(loss: Loss, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    with torch.enable_grad(), _plain_kernels():
        value = loss() if callable(loss) else loss
        if not value.requires_grad:
            raise ArgumentError(
                OWNER,
                "the loss has no graph to its parameters",
                cure="hessian_trace(lambda: loss_of(batch), list(module.parameters()))",
            )
        return list(torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True))


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention by kernels that have a second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
