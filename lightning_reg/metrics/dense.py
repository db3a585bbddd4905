"""Metrics over pixels and tokens: predictions whose classes lie in any dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.exact import ExactMetric, MeanMetric


class DenseMetric(ExactMetric):
    """Base of metrics whose predictions may be images or sequences.

    :meth:`accumulate` gets rows in blocks, so that what is made on the way (float64 logarithms,
    masks) is as large as a block and not as the batch.

    Args:
        class_dim: the dimension of the classes: 1 for (N, C, H, W), -1 for (N, T, V). A binary
            task has none.
        kwargs: those of :class:`~lightning_reg.metrics.exact.ExactMetric`.
    """

    def __init__(self, *, class_dim: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(class_dim, int) or isinstance(class_dim, bool):
            raise ArgumentError(
                self, f"`class_dim` must be a whole number, got {class_dim!r}", cure="class_dim=-1"
            )
        self.class_dim = class_dim

    def update(self, preds: Tensor, target: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            preds: predictions, as ``task``, ``from_logits`` and ``class_dim`` say.
            target: class indices of the shape of ``preds`` without ``class_dim``, or soft targets
                of the shape of ``preds``.

        Raises:
            ArgumentError: if shapes or values are not those of the task.
        """
        if target is None and self.ignore_index is not None:
            raise ArgumentError(
                self,
                "with `ignore_index` the targets say which positions count",
                cure="metric.update(logits, target)",
            )
        if self.task != "binary" and preds.ndim > 1:
            preds, target = self._classes_second(preds, target)
        super().update(preds, target)

    def _classes_second(self, preds: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not -preds.ndim <= self.class_dim < preds.ndim:
            raise ArgumentError(
                self,
                f"predictions of shape {tuple(preds.shape)} have no dimension {self.class_dim}",
                cure="class_dim=-1",
            )
        if target is not None and target.is_floating_point() and target.shape == preds.shape:
            target = target.movedim(self.class_dim, 1)
        return preds.movedim(self.class_dim, 1), target


class DenseMean(DenseMetric, MeanMetric):
    """Base of metrics that are the mean of one number per pixel or token.

    A subclass supplies :meth:`values`, which gets the rows of one block.
    """
