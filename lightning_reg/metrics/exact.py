"""Metrics whose state has a fixed size, adds up over batches and ranks, and is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_reg.metrics.inputs import Rows, Task, check_arguments, high_precision, read_rows


class ExactMetric(Metric):
    """Base of metrics over the rows of predictions.

    A subclass adds states with :meth:`add_count` and :meth:`add_total`, adds a batch to them in
    :meth:`accumulate`, and reads them in :meth:`value`. Counts are int64 and sums float64, which
    MPS does not have: moved there, sums go on in float32 and are exact to its rounding.

    Args:
        from_logits: whether predictions are logits (``True``) or probabilities.
        task: ``"multiclass"``: predictions (N, C, ...); ``"binary"``: (N, ...), of the positive
            class.
        ignore_index: positions whose target is this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    invalid: Tensor

    def __init__(
        self,
        *,
        from_logits: bool,
        task: Task = "multiclass",
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_arguments(self, task, from_logits)
        self.from_logits = from_logits
        self.task: Task = task
        self.ignore_index = ignore_index
        self.validate_args = validate_args
        self.add_count("invalid")

    def add_count(self, name: str, *shape: int) -> None:
        """A state of int64 counts: float32 counts stop at 2^24."""
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def add_total(self, name: str, *shape: int) -> None:
        """A state of float64 sums."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def accumulate(self, rows: Rows) -> None:
        """Add a batch to the states, out of place: they may belong to inference mode."""
        raise NotImplementedError

    def value(self) -> Tensor:
        """The result from the states as they are: of all ranks only within ``sync_context()``."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """The result over everything that was counted, on all ranks."""
        self.warn_of_invalid()
        return self.value()

    def update(self, preds: Tensor, target: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            preds: predictions, as ``task`` and ``from_logits`` say.
            target: class indices, or soft targets of the shape of ``preds``.

        Raises:
            ArgumentError: if shapes or values are not those of the task.
        """
        rows = read_rows(
            self,
            preds,
            target,
            task=self.task,
            from_logits=self.from_logits,
            ignore_index=self.ignore_index,
            validate=self.validate_args,
        )
        self.invalid = self.invalid + rows.invalid
        self.accumulate(rows)

    def warn_of_invalid(self) -> None:
        """Say how many rows were left out because they held NaN or infinity."""
        if int(self.invalid):
            rank_zero_warn(
                f"{type(self).__name__}: {int(self.invalid)} predictions held NaN or infinity "
                "and were left out."
            )

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Any:
        try:
            return super()._apply(fn, exclude_state)
        except TypeError as error:
            if "float64" not in str(error):
                raise
            for name, default in self._defaults.items():
                if isinstance(default, Tensor) and default.dtype == torch.float64:
                    self._defaults[name] = default.float()
                    setattr(self, name, getattr(self, name).float())
            return super()._apply(fn, exclude_state)


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
        """Add the batch's sum and count."""
        values = high_precision(self.values(rows.scores, rows.targets))
        self.total = self.total + values.sum().to(self.total)
        self.count = self.count + values.numel()

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.total / self.count
