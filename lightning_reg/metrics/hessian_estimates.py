"""Sharpness of the loss as metrics: batches are added one by one, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.hessian import (
    Distribution,
    End,
    check_lanczos,
    check_probes,
    hessian_eigenvalues,
    hessian_trace,
    mean_of_probes,
    top_of,
)
from lightning_reg.metrics.hessian_product import HessianProduct, dot, draw_probes

__all__ = ["HessianTopEigenvalue", "HessianTrace"]


class HessianTrace(Metric):
    """The trace of the Hessian of the mean loss over batches and ranks (Hutchinson's estimator).

    The trace is linear in the loss and every batch meets the same random vectors, so that the
    state is one sum per vector, and the result that of :func:`hessian_trace` on all batches
    together. NaN before anything was added.

    Args:
        probes: the number of random vectors; each costs one Hessian-vector product a batch.
        distribution: of their entries: ``"rademacher"`` or ``"gaussian"``.
        seed: of the vectors; has to be the same on all ranks.
        kwargs: those of ``torchmetrics.Metric``.

    Attributes:
        standard_error: of the last computed value, from the spread of the vectors.

    Raises:
        ArgumentError: if an argument is outside its range.

    Example:
        >>> import torch
        >>> from lightning_reg import HessianTrace
        >>> w, metric = torch.ones(2, requires_grad=True), HessianTrace(probes=4)
        >>> metric.update((w ** 4).sum(), [w])
        >>> metric.compute()
        tensor(24., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    function = staticmethod(hessian_trace)
    sums: Tensor
    total: Tensor

    def __init__(
        self,
        probes: int = 30,
        *,
        distribution: Distribution = "rademacher",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_probes(probes, distribution)
        self.probes, self.distribution, self.seed = probes, distribution, seed
        self.standard_error = torch.tensor(float("nan"))
        self.add_state("sums", torch.zeros(probes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, loss: Tensor | Callable[[], Tensor], parameters: Sequence[Tensor], weight: float = 1.0
    ) -> None:
        """Add one batch.

        Args:
            loss: the mean loss of the batch, with its graph or as a function.
            parameters: what it is differentiated by.
            weight: how much the batch counts: its number of samples.
        """
        product = HessianProduct(loss, parameters)
        generator = product.generator(self.seed)
        values = []
        for _ in range(self.probes):
            probe = draw_probes(product, 1, self.distribution, generator)
            values.append(dot(probe, product(probe)))
        self.sums = self.sums + weight * torch.stack(values).to(self.sums)
        self.total = self.total + weight

    def compute(self) -> Tensor:
        """The trace, of all batches on all ranks."""
        value, self.standard_error = mean_of_probes(self.sums / self.total)
        return value


class HessianTopEigenvalue(Metric):
    """The largest eigenvalue of the Hessian of the mean loss over batches and ranks (Lanczos).

    An eigenvalue of a mean is no mean of eigenvalues, so the losses are kept and computed again
    for each of the products with the joint Hessian. NaN before anything was added.

    Args:
        k: how many eigenvalues; with 1 the value is a scalar, else (k,).
        which: the ``"largest"`` or the ``"smallest"``, with their signs.
        iterations: products with the Hessian at most.
        tolerance: stop when residuals are below this share of the largest magnitude.
        seed: of the first vector; has to be the same on all ranks.
        kwargs: those of ``torchmetrics.Metric``.

    Raises:
        ArgumentError: if an argument is outside its range; in ``update`` for a loss that is not a
            function, or other parameters than before.

    Note:
        Over ranks each product is reduced as it is made: all ranks compute together, and each
        needs a batch at least.

    Example:
        >>> import torch
        >>> from lightning_reg import HessianTopEigenvalue
        >>> w, metric = torch.tensor([1.0, 2.0], requires_grad=True), HessianTopEigenvalue()
        >>> metric.update(lambda: (w ** 3).sum(), [w])
        >>> round(float(metric.compute()), 3)
        12.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = True
    function = staticmethod(hessian_eigenvalues)

    def __init__(
        self,
        k: int = 1,
        *,
        which: End = "largest",
        iterations: int = 100,
        tolerance: float = 1e-4,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_lanczos(k, which, iterations, tolerance)
        self.k, self.which, self.iterations = k, which, iterations
        self.tolerance, self.seed = tolerance, seed
        self._losses: list[Callable[[], Tensor]] = []
        self._weights: list[float] = []
        self._learned: list[Tensor] = []

    def update(
        self, loss: Callable[[], Tensor], parameters: Sequence[Tensor], weight: float = 1.0
    ) -> None:
        """Add one batch.

        Args:
            loss: computes the mean loss of the batch.
            parameters: what it is differentiated by, the same for all batches.
            weight: how much the batch counts: its number of samples.
        """
        parameters = list(parameters)
        if not callable(loss):
            raise ArgumentError(
                self, "needs a function, to compute the loss again", cure="lambda: loss_of(batch)"
            )
        if self._learned and list(map(id, parameters)) != list(map(id, self._learned)):
            raise ArgumentError(
                self, "the parameters are not those of the batch before", cure="metric.reset()"
            )
        self._learned = parameters
        self._losses.append(loss)
        self._weights.append(float(weight))

    def compute(self) -> Tensor:
        """The eigenvalues, of all batches on all ranks."""
        if not self._losses:
            return torch.full((self.k,) if self.k > 1 else (), float("nan"), dtype=torch.float64)
        product = HessianProduct(
            self._losses, self._learned, weights=self._weights, comm=_all_ranks()
        )
        values = top_of(
            product, self.k, self.which, self.iterations, self.tolerance, self.seed
        ).values
        return values[0] if self.k == 1 else values

    def reset(self) -> None:
        """Drop the batches."""
        super().reset()
        self._losses, self._weights, self._learned = [], [], []

    def __getstate__(self) -> dict[str, Any]:
        # Batches and a network's parameters are no part of a copy.
        fresh: dict[str, Any] = {"_losses": [], "_weights": [], "_learned": []}
        return {**super().__getstate__(), **fresh}


def _all_ranks() -> Communicator:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Communicator(dist.get_rank(), dist.get_world_size())
    return Communicator()
