"""How near queries come to the nearest of a set of embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import AdditiveMetric, evaluate
from lightning_reg.metrics.inputs import high_precision

__all__ = ["Utilization", "utilization"]

_BLOCK = 2**22
"""Distances that are held at once: 32 MiB."""


def utilization(queries: Tensor, references: Tensor, *, validate_args: bool = True) -> Tensor:
    r"""``u(Q, X) = mean_{q in Q} min_{x in X} ||q - x||^2``.

    Low where every query has a reference near by: with embeddings of training samples as
    references and of samples of other classes as queries, how much of the space that unseen
    classes need was in use during training.

    Args:
        queries: (N, d) embeddings.
        references: (M, d) embeddings, M at least 1.
        validate_args: check values of the references, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS), in squared units of the embedding; NaN if nothing
        counts.

    Raises:
        ArgumentError: if shapes do not belong together, or a reference is not finite.

    Example:
        >>> import torch
        >>> utilization(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(2.5000, dtype=torch.float64)
    """
    metric = Utilization(references, validate_args=validate_args)
    value: Tensor = evaluate(metric, queries)
    return value


class Utilization(AdditiveMetric):
    """The mean squared distance of queries to the nearest reference.

    Venkataramanan et al., It Takes Two to Tango: Mixup for Deep Metric Learning, 2021. See
    :func:`utilization`; definition from memory of the paper, not checked. References are given
    once and are no state: every rank has to hold all of them. The state is one float64 sum
    (float32 on MPS) and a count.

    Args:
        references: (M, d) embeddings.
        validate_args: check values of the references, which costs a host sync.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import Utilization
        >>> metric = Utilization(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    papers = (
        Paper(
            "It Takes Two to Tango: Mixup for Deep Metric Learning",
            "Venkataramanan et al.",
            2021,
            "2106.04990",
        ),
    )
    higher_is_better = False
    plot_lower_bound = 0.0
    function = staticmethod(utilization)
    distance_total: Tensor
    count: Tensor

    def __init__(self, references: Tensor, *, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        good = isinstance(references, Tensor) and references.ndim == 2 and len(references) > 0
        if not good or not references.is_floating_point():
            shape = tuple(references.shape) if isinstance(references, Tensor) else references
            raise ArgumentError(
                self,
                f"needs float references (M, d), got {shape!r}",
                cure="Utilization(torch.cat(train_embeddings))",
            )
        if validate_args and not bool(torch.isfinite(references).all()):
            raise ArgumentError(
                self,
                "a reference holds NaN or infinity",
                cure="Utilization(x[x.isfinite().all(1)])",
            )
        self.references = high_precision(references.detach()).clone()
        self.validate_args = validate_args
        self.add_total("distance_total")
        self.add_count("count")

    def update_settings(self) -> tuple[Any, ...]:
        """The references, by a few of their numbers."""
        key = (tuple(self.references.shape), float(self.references.sum()))
        return (*super().update_settings(), *key)

    def update(self, queries: Tensor) -> None:
        """Count one batch.

        Args:
            queries: (N, d) embeddings.

        Raises:
            ArgumentError: if they are not of the width of the references.
        """
        width = self.references.shape[1]
        if queries.ndim != 2 or queries.shape[1] != width or not queries.is_floating_point():
            raise ArgumentError(
                self,
                f"needs float queries (N, {width}), got {tuple(queries.shape)}",
                cure="metric.update(embeddings.flatten(1))",
            )
        found = high_precision(queries.detach())
        valid = torch.isfinite(found).all(1)
        references = self.references.to(found.device)
        for block in found[valid].split(max(1, _BLOCK // len(references))):
            distances = torch.cdist(block, references, compute_mode=_EXACT).amin(1)
            self.distance_total = self.distance_total + distances.square().sum()
        self.invalid = self.invalid + (~valid).sum()
        self.count = self.count + valid.sum()

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.distance_total / self.count


_EXACT = "donot_use_mm_for_euclid_dist"
