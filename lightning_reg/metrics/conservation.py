"""How far predictions are from a conservation law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import AdditiveMetric, evaluate
from lightning_reg.metrics.inputs import high_precision
from lightning_reg.metrics.regression import finite_blocks

__all__ = ["ConservationError", "conservation_error"]


def conservation_error(preds: Tensor, total: Tensor, *, weights: Sequence[float]) -> Tensor:
    """The mean of ``|G u - b|``: by how much predictions miss a known total.

    Args:
        preds: ``u`` (N, ..., n), predictions on a grid.
        total: ``b`` (N, ...), what they should add up to.
        weights: ``G``, n numbers: the weights of a quadrature.

    Returns:
        A float64 scalar; NaN if nothing counts.

    Raises:
        ArgumentError: if shapes do not fit, or a weight is not finite.

    Example:
        >>> import torch
        >>> preds = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
        >>> conservation_error(preds, torch.tensor([1.5, 1.0]), weights=[0.5, 0.5])
        tensor(0.5000, dtype=torch.float64)
    """
    value: Tensor = evaluate(ConservationError(weights=weights), preds, total)
    return value


class ConservationError(AdditiveMetric):
    """The mean of ``|G u - b|``: by how much predictions miss a known total.

    See :func:`conservation_error`. After an exact projection
    (:class:`~lightning_reg.ConservationProjectionMixin`) it is 0 to rounding. The state is a
    float64 sum (float32 on MPS) and an int64 count.

    Args:
        weights: ``G``, n numbers.
        kwargs: those of ``torchmetrics.Metric``.

    Raises:
        ArgumentError: if there is no weight, or one is not finite.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ConservationError
        >>> metric = ConservationError(weights=[0.5, 0.5])
        >>> metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([1.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    function = staticmethod(conservation_error)
    higher_is_better = False
    plot_lower_bound = 0.0
    error: Tensor
    count: Tensor

    def __init__(self, *, weights: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weights = tuple(float(w) for w in weights)
        if not self.weights or not all(abs(w) < float("inf") for w in self.weights):
            raise ArgumentError(
                self,
                f"`weights` must be finite numbers, one a point, got {list(self.weights)}",
                cure="weights=trapezoid_weights(points).tolist()",
            )
        self.add_total("error")
        self.add_count("count")

    def update(self, preds: Tensor, total: Tensor) -> None:
        """Count one batch.

        Args:
            preds: (N, ..., n).
            total: (N, ...).

        Raises:
            ArgumentError: if shapes do not fit.
        """
        wanted = (*total.shape, len(self.weights))
        if preds.shape != wanted or not preds.is_floating_point():
            raise ArgumentError(
                self,
                f"totals of shape {tuple(total.shape)} and {len(self.weights)} weights need float "
                f"predictions of shape {wanted}, got {preds.dtype} of {tuple(preds.shape)}",
                cure="metric.update(preds, total)",
            )
        rows = high_precision(preds.detach())
        reached = rows @ torch.tensor(self.weights, dtype=rows.dtype, device=rows.device)
        for (found, known), invalid in finite_blocks(self, {"preds": reached, "total": total}):
            self.invalid = self.invalid + invalid
            self.error = self.error + (found - known).abs().sum().to(self.error)
            self.count = self.count + found.numel()

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.error / self.count
