"""Metrics with a state for each class."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.dense import DenseMetric
from lightning_reg.metrics.inputs import Rows


class ClassesMetric(DenseMetric):
    """Base of metrics with a state for each class."""

    plot_lower_bound = 0.0

    def __init__(self, *, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 2:
            raise ArgumentError(
                self,
                f"`num_classes` must be a whole number from 2, got {num_classes!r}",
                cure="num_classes=10",
            )
        if self.task != "multiclass":
            raise ArgumentError(
                self,
                "is for several classes: give both probabilities of a binary task",
                cure="metric.update(torch.stack([1 - p, p], 1), target)",
            )
        self.num_classes = num_classes

    def refuse_other_width(self, rows: Rows) -> None:
        """Refuse predictions that have not ``num_classes`` classes."""
        if rows.scores.shape[1] != self.num_classes:
            raise ArgumentError(
                self,
                f"is for {self.num_classes} classes, got predictions of {rows.scores.shape[1]}",
                cure=f"num_classes={rows.scores.shape[1]}",
            )

    def targets(self, rows: Rows) -> Tensor:
        """The targets of a block, or an error that asks for them."""
        if rows.targets is None:
            raise ArgumentError(self, "needs targets", cure="metric.update(logits, target)")
        return rows.targets
