"""Metrics over pixels and tokens, read in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.blocks import split_alike
from lightning_reg.metrics.exact import ExactMetric, MeanMetric
from lightning_reg.metrics.inputs import Rows, check_shapes, read_rows


class DenseMetric(ExactMetric):
    """Base of metrics whose predictions may be images or sequences.

    A batch is read in blocks (``metrics.blocks.BLOCK`` scores), so that what is made on the way
    (float64 logarithms, masks, the rows themselves) is as large as a block and not as the batch.
    :meth:`accumulate` gets the rows of one block.

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
        for rows in self._blocks(preds, target):
            self.invalid = self.invalid + rows.invalid
            self.accumulate(rows)

    def _blocks(self, preds: Tensor, target: Tensor | None) -> Iterator[Rows]:
        preds, target = self._classes_last(preds, target)
        positions = preds.ndim - (self.task == "multiclass")
        given = [preds] if target is None else [preds, target]
        for block in split_alike(given, positions):
            rows = [t.reshape(-1, *t.shape[positions:]) for t in block]
            yield read_rows(
                self,
                rows[0],
                rows[1] if len(rows) > 1 else None,
                task=self.task,
                from_logits=self.from_logits,
                ignore_index=self.ignore_index,
                validate=self.validate_args,
            )

    def _classes_last(self, preds: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.task == "binary":
            check_shapes(self, preds, target, self.task)
            return preds, target
        if not -preds.ndim <= self.class_dim < preds.ndim:
            raise ArgumentError(
                self,
                f"predictions of shape {tuple(preds.shape)} have no dimension {self.class_dim}; "
                "needs float predictions (N, C, ...)",
                cure="class_dim=-1",
            )
        soft = target is not None and target.is_floating_point() and target.shape == preds.shape
        if preds.ndim > 1:
            preds = preds.movedim(self.class_dim, 1)
            target = target.movedim(self.class_dim, 1) if soft and target is not None else target
        check_shapes(self, preds, target, self.task)
        last = target.movedim(1, -1) if soft and target is not None else target
        return preds.movedim(1, -1), last


class DenseMean(DenseMetric, MeanMetric):
    """Base of metrics that are the mean of one number per pixel or token.

    A subclass supplies :meth:`values`, which gets the rows of one block.
    """
