"""Metrics over the rows of predictions."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.metrics.additive import AdditiveMetric
from lightning_reg.metrics.inputs import (
    BLOCK,
    TASKS,
    AnyTask,
    Rows,
    check_arguments,
    high_precision,
    read_blocks,
)


class ExactMetric(AdditiveMetric):
    """Base of metrics over the rows of predictions.

    A subclass adds states with :meth:`add_count` and :meth:`add_total`, adds rows to them in
    :meth:`accumulate`, which is called for one cache-sized block of a batch after the other, and
    reads them in :meth:`value`.

    Args:
        from_logits: whether predictions are logits (``True``) or probabilities.
        task: ``"multiclass"``: predictions (N, C, ...); ``"binary"``: (N, ...), of the positive
            class.
        ignore_index: positions whose target is this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.
    """

    tasks: ClassVar[tuple[str, ...]] = TASKS
    block_size: int = BLOCK

    def __init__(
        self,
        *,
        from_logits: bool,
        task: AnyTask = "multiclass",
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_arguments(self, task, from_logits, self.tasks)
        self.from_logits = from_logits
        self.task: AnyTask = task
        self.ignore_index = ignore_index
        self.validate_args = validate_args

    def accumulate(self, rows: Rows) -> None:
        """Add to the states, in place if you like: rows that come in blocks make up a batch."""
        raise NotImplementedError

    def update(self, preds: Tensor, target: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            preds: predictions, as ``task`` and ``from_logits`` say.
            target: class indices, or soft targets of the shape of ``preds``.

        Raises:
            ArgumentError: if shapes or values are not those of the task.
        """
        blocks = read_blocks(
            self,
            preds,
            target,
            task=self.task,
            from_logits=self.from_logits,
            ignore_index=self.ignore_index,
            validate=self.validate_args,
            block=self.block_size,
        )
        for rows in blocks:
            self.invalid += rows.invalid
            self.accumulate(rows)


class MeanMetric(ExactMetric):
    """Base of metrics that are the mean of one number per row.

    A subclass supplies :meth:`values`. NaN before anything was counted.
    """

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_total("total")
        self.add_count("count")

    def values(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """One number per row (N,), in high precision.

        Args:
            scores: (N, C), or (N,) for a binary task.
            targets: (N,) class indices or floats of the shape of ``scores``.
        """
        raise NotImplementedError

    def accumulate(self, rows: Rows) -> None:
        """Add the sum and the count."""
        values = high_precision(self.values(rows.scores, rows.targets))
        self.total = self.total + values.sum().to(self.total)
        self.count = self.count + values.numel()

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.total / self.count
