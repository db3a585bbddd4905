"""Prediction intervals: how often they hold the target, and how wide they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.metrics.additive import AdditiveMetric, evaluate
from lightning_reg.metrics.regression import SCALES, ScaleIs, finite_blocks

__all__ = [
    "IntervalCoverage",
    "IntervalWidth",
    "gaussian_interval",
    "gaussian_quantiles",
    "interval_coverage",
    "interval_width",
]


def gaussian_quantiles(mean: Tensor, scale: Tensor, levels: Tensor, *, scale_is: ScaleIs) -> Tensor:
    """The quantiles ``mu + sigma Phi^-1(q)`` of Gaussian predictions.

    Args:
        mean: (N, ...) predicted means.
        scale: (N, ...) standard deviations or variances.
        levels: (Q,) in (0, 1).
        scale_is: ``"std"`` or ``"variance"``; never guessed.

    Returns:
        (N, ..., Q), the layout of :class:`~lightning_reg.metrics.QuantileCalibrationError`.

    Raises:
        ArgumentError: if ``scale_is`` is neither, or a level is outside (0, 1).

    Example:
        >>> import torch
        >>> levels = torch.tensor([0.5, 0.975])
        >>> gaussian_quantiles(torch.zeros(1), torch.ones(1), levels, scale_is="std")
        tensor([[0.0000, 1.9600]])
    """
    if scale_is not in SCALES:
        raise ArgumentError(
            "gaussian_quantiles",
            f"`scale_is` must be one of {', '.join(SCALES)}, got {scale_is!r}",
            cure='scale_is="std"',
        )
    if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
        raise ArgumentError(
            "gaussian_quantiles",
            "`levels` must be a vector of numbers inside (0, 1)",
            cure="levels=torch.tensor([0.05, 0.5, 0.95])",
        )
    std = scale.sqrt() if scale_is == "variance" else scale
    z = torch.special.ndtri(levels.double()).to(mean)
    quantiles: Tensor = mean.unsqueeze(-1) + std.unsqueeze(-1) * z
    return quantiles


def gaussian_interval(
    mean: Tensor, scale: Tensor, *, level: float, scale_is: ScaleIs
) -> tuple[Tensor, Tensor]:
    """The ends of the central interval that holds ``level`` of each Gaussian's mass.

    Args:
        mean: (N, ...) predicted means.
        scale: (N, ...) standard deviations or variances.
        level: in (0, 1), such as 0.9.
        scale_is: ``"std"`` or ``"variance"``; never guessed.

    Returns:
        The lower and the upper ends, (N, ...) each.

    Raises:
        ArgumentError: if ``level`` is outside (0, 1) or ``scale_is`` is neither.

    Example:
        >>> import torch
        >>> gaussian_interval(torch.zeros(1), torch.ones(1), level=0.95, scale_is="std")
        (tensor([-1.9600]), tensor([1.9600]))
    """
    check_range("gaussian_interval", "level", level, 0, 1, low_open=True, high_open=True)
    levels = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    lower, upper = gaussian_quantiles(mean, scale, levels, scale_is=scale_is).unbind(-1)
    return lower, upper


def interval_coverage(
    lower: Tensor, upper: Tensor, target: Tensor, *, validate_args: bool = True
) -> Tensor:
    """The share of targets inside their intervals, both ends included (PICP).

    Args:
        lower: (N, ...) the lower ends.
        upper: (N, ...) the upper ends.
        target: (N, ...) what was observed.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar; NaN if nothing counts. Compare it with the intervals' nominal level.

    Raises:
        ArgumentError: if shapes differ, or a lower end is above its upper end.

    Example:
        >>> import torch
        >>> interval_coverage(torch.zeros(4), torch.ones(4), torch.tensor([0.0, 0.5, 1.0, 2.0]))
        tensor(0.7500, dtype=torch.float64)
    """
    value: Tensor = evaluate(IntervalCoverage(validate_args=validate_args), lower, upper, target)
    return value


def interval_width(
    lower: Tensor, upper: Tensor, target: Tensor, *, validate_args: bool = True
) -> Tensor:
    """The mean width of intervals, in units of the target (MPIW).

    Args:
        lower: (N, ...) the lower ends.
        upper: (N, ...) the upper ends.
        target: (N, ...) what was observed; only its shape and whether it is finite count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if shapes differ, or a lower end is above its upper end.

    Example:
        >>> import torch
        >>> interval_width(torch.zeros(2), torch.tensor([1.0, 3.0]), torch.zeros(2))
        tensor(2., dtype=torch.float64)
    """
    value: Tensor = evaluate(IntervalWidth(validate_args=validate_args), lower, upper, target)
    return value


class _IntervalMetric(AdditiveMetric):
    """What both metrics of intervals count; in a collection they share the update."""

    covered: Tensor
    width_sum: Tensor
    count: Tensor

    def __init__(self, *, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.validate_args = validate_args
        self.add_count("covered")
        self.add_count("count")
        self.add_total("width_sum")

    def update_settings(self) -> tuple[Any, ...]:
        """The same for coverage and width."""
        return ("intervals", self.validate_args)

    def update(self, lower: Tensor, upper: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            lower: (N, ...) the lower ends.
            upper: (N, ...) the upper ends.
            target: (N, ...) what was observed.

        Raises:
            ArgumentError: if shapes differ, or a lower end is above its upper end.
        """
        given = {"lower": lower, "upper": upper, "target": target}
        for (low, high, y), invalid in finite_blocks(self, given):
            if self.validate_args and bool((low > high).any()):
                raise ArgumentError(
                    self,
                    f"{int((low > high).sum())} lower ends are above their upper ends",
                    cure="metric.update(torch.minimum(a, b), torch.maximum(a, b), target)",
                )
            self.invalid = self.invalid + invalid
            self.covered = self.covered + ((low <= y) & (y <= high)).sum()
            self.width_sum = self.width_sum + (high - low).sum().to(self.width_sum)
            self.count = self.count + y.numel()


class IntervalCoverage(_IntervalMetric):
    """The share of targets inside their prediction intervals (PICP), both ends included.

    The state is two int64 counts and a float64 sum. Equal to ``torch_uncertainty``'s
    ``IntervalCoverage``. :func:`gaussian_interval` makes the ends from means and spreads.

    Args:
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import IntervalCoverage
        >>> metric = IntervalCoverage()
        >>> metric.update(torch.zeros(2), torch.ones(2), torch.tensor([1.0, 2.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    function = staticmethod(interval_coverage)
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def value(self) -> Tensor:
        """The share over everything that was counted."""
        return self.covered.to(self.width_sum) / self.count


class IntervalWidth(_IntervalMetric):
    """The mean width of prediction intervals (MPIW), in units of the target.

    The state is that of :class:`IntervalCoverage`: a collection of both counts once.

    Args:
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import IntervalWidth
        >>> metric = IntervalWidth()
        >>> metric.update(torch.zeros(2), torch.tensor([1.0, 3.0]), torch.zeros(2))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    function = staticmethod(interval_width)
    higher_is_better = False
    plot_lower_bound = 0.0

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.width_sum / self.count
