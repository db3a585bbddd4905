"""Whether predicted variances are the squared errors that come true."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.regression import GaussianMetric, Gaussians, ScaleIs

# Fine bins of variance: 16 for each factor of two, from 2^-64 to 2^64.
_PER_OCTAVE = 16
_OCTAVES = 64
_FINE = 2 * _OCTAVES * _PER_OCTAVE

__all__ = [
    "ExpectedNormalizedCalibrationError",
    "UncertaintyBins",
    "UncertaintyCalibrationError",
    "expected_normalized_calibration_error",
    "uncertainty_calibration_error",
]


class UncertaintyBins(NamedTuple):
    """Predictions by their variance; empty bins are left out.

    Attributes:
        counts: (B,) int64, the predictions in each bin.
        variance: (B,) their mean variance.
        squared_error: (B,) their mean squared error.
    """

    counts: Tensor
    variance: Tensor
    squared_error: Tensor


def expected_normalized_calibration_error(
    mean: Tensor,
    scale: Tensor,
    target: Tensor,
    *,
    scale_is: ScaleIs,
    n_bins: int = 15,
    limits: tuple[float, float] | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The expected normalized calibration error of predicted variances (ENCE).

    ``1/B sum_b |RMV_b - RMSE_b| / RMV_b`` over bins of predictions with like variance, where
    ``RMV_b`` is the root of their mean variance and ``RMSE_b`` the root of their mean squared
    error. Levi et al., Evaluating and Calibrating Uncertainty Prediction in Regression Tasks,
    2019 (1905.11659). Formula from memory of the paper; not checked against code.

    Bins hold about N / n_bins predictions each. They are put together from 2048 fine bins of
    variance (16 for each factor of two, from 2^-64 to 2^64; beyond, the last one): counts and
    means are exact, only the place of a bin's edge moves, to the nearest edge of a fine bin,
    which are 4.4 % of a variance apart. Equal variances therefore always share a bin, and the
    order of samples makes no difference, as it does where a sort cuts through ties.

    Args:
        mean: (N, ...) predicted means.
        scale: (N, ...) standard deviations or variances, above 0.
        target: (N, ...) what was observed.
        scale_is: ``"std"`` or ``"variance"``; never guessed.
        n_bins: the number of bins; those that stay empty do not count.
        limits: two variances: equal-width bins between them instead, those at the ends open.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> mean, std = torch.zeros(2), torch.ones(2)
        >>> target = torch.tensor([2.0, -2.0])  # errors twice as large as promised
        >>> expected_normalized_calibration_error(mean, std, target, scale_is="std")
        tensor(1., dtype=torch.float64)
    """
    metric = ExpectedNormalizedCalibrationError(
        scale_is=scale_is, n_bins=n_bins, limits=limits, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, mean, scale, target)
    return value


def uncertainty_calibration_error(
    mean: Tensor,
    scale: Tensor,
    target: Tensor,
    *,
    scale_is: ScaleIs,
    n_bins: int = 15,
    limits: tuple[float, float] | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The uncertainty calibration error of predicted variances (UCE), in squared units.

    ``sum_b n_b / N |MSE_b - MV_b|`` over bins of predictions with like variance, ``MV_b`` their
    mean variance and ``MSE_b`` their mean squared error. Laves et al., Well-Calibrated Regression
    Uncertainty in Medical Imaging with Deep Learning, 2020, with equal-width bins of variance:
    give ``limits`` for those. Formula from memory of the paper; not checked against code. There
    the limits default to the sample's own least and largest variance, which a single outlier
    moves and which no fixed-size state can know beforehand; here the default is bins of equal
    mass, as :func:`expected_normalized_calibration_error` says.

    Args:
        mean: (N, ...) predicted means.
        scale: (N, ...) standard deviations or variances, above 0.
        target: (N, ...) what was observed.
        scale_is: ``"std"`` or ``"variance"``; never guessed.
        n_bins: the number of bins.
        limits: two variances: equal-width bins between them, those at the ends open.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> mean, std = torch.zeros(2), torch.ones(2)
        >>> uncertainty_calibration_error(mean, std, torch.tensor([2.0, -2.0]), scale_is="std")
        tensor(3., dtype=torch.float64)
    """
    metric = UncertaintyCalibrationError(
        scale_is=scale_is, n_bins=n_bins, limits=limits, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, mean, scale, target)
    return value


class _UncertaintyMetric(GaussianMetric):
    """What ENCE and UCE count; in a collection they share the update."""

    higher_is_better = False
    plot_lower_bound = 0.0
    counts: Tensor
    variance_sum: Tensor
    squared_error_sum: Tensor

    def __init__(
        self,
        *,
        scale_is: ScaleIs,
        n_bins: int = 15,
        limits: tuple[float, float] | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(scale_is=scale_is, validate_args=validate_args, **kwargs)
        if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
            raise ArgumentError(
                self, f"`n_bins` must be a whole number from 1, got {n_bins!r}", cure="n_bins=15"
            )
        if limits is not None and not (len(limits) == 2 and 0 <= limits[0] < limits[1]):
            raise ArgumentError(
                self,
                f"`limits` must be two variances, the larger one last, got {limits!r}",
                cure="limits=(0.0, 1.0)",
            )
        self.n_bins = n_bins
        self.limits = None if limits is None else (float(limits[0]), float(limits[1]))
        size = _FINE if limits is None else n_bins
        self.add_count("counts", size)
        self.add_total("variance_sum", size)
        self.add_total("squared_error_sum", size)

    def update_settings(self) -> tuple[Any, ...]:
        """The same for ENCE and UCE; equal-mass bins of any number have the same state."""
        n_bins = None if self.limits is None else self.n_bins
        return ("uncertainty", self.scale_is, self.validate_args, self.limits, n_bins)

    def accumulate(self, given: Gaussians) -> None:
        """Add the block's counts and sums."""
        variance = given.std.square()
        error = (given.target - given.mean).square()
        index = self._index(variance)
        self.counts = self.counts.index_add(0, index, torch.ones_like(index))
        self.variance_sum = self.variance_sum.index_add(0, index, variance)
        self.squared_error_sum = self.squared_error_sum.index_add(0, index, error)

    def bins(self) -> UncertaintyBins:
        """The bins of what was counted: by this process, or by all within ``sync_context()``."""
        states = (self.counts, self.variance_sum, self.squared_error_sum)
        if self.limits is None:
            index = _equal_mass(self.counts, self.n_bins)
            states = tuple(s.new_zeros(self.n_bins).index_add(0, index, s) for s in states)  # type: ignore[assignment]
        filled = states[0] > 0
        counts, variance, error = (s[filled] for s in states)
        return UncertaintyBins(counts, variance / counts, error / counts)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Root mean squared error against root mean variance by bin, drawn from the state.

        Args:
            val: bins to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.regression_figures import draw_uncertainty

        return draw_uncertainty(self.bins() if val is None else val, ax=ax)

    def _index(self, variance: Tensor) -> Tensor:
        if self.limits is None:
            octave = variance.log2() * _PER_OCTAVE
            return (octave.floor().long() + _OCTAVES * _PER_OCTAVE).clamp(0, _FINE - 1)
        low, high = self.limits
        place = (variance - low) / (high - low) * self.n_bins
        return place.floor().long().clamp(0, self.n_bins - 1)


class ExpectedNormalizedCalibrationError(_UncertaintyMetric):
    """The expected normalized calibration error of predicted variances (ENCE).

    See :func:`expected_normalized_calibration_error`. The state is three vectors of 2048 numbers,
    or of ``n_bins`` with ``limits``.

    Args:
        scale_is: whether ``update`` gets the ``"std"`` or the ``"variance"``.
        n_bins: the number of bins.
        limits: two variances: equal-width bins between them, instead of bins of equal mass.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ExpectedNormalizedCalibrationError
        >>> metric = ExpectedNormalizedCalibrationError(scale_is="std")
        >>> metric.update(torch.zeros(2), torch.ones(2), torch.tensor([2.0, -2.0]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    function = staticmethod(expected_normalized_calibration_error)

    def value(self) -> Tensor:
        """The error over everything that was counted."""
        bins = self.bins()
        promised, real = bins.variance.sqrt(), bins.squared_error.sqrt()
        return ((promised - real).abs() / promised).mean()


class UncertaintyCalibrationError(_UncertaintyMetric):
    """The uncertainty calibration error of predicted variances (UCE), in squared units.

    See :func:`uncertainty_calibration_error`. The state is that of
    :class:`ExpectedNormalizedCalibrationError`: a collection of both counts once.

    Args:
        scale_is: whether ``update`` gets the ``"std"`` or the ``"variance"``.
        n_bins: the number of bins.
        limits: two variances: equal-width bins between them, instead of bins of equal mass.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import UncertaintyCalibrationError
        >>> metric = UncertaintyCalibrationError(scale_is="std")
        >>> metric.update(torch.zeros(2), torch.ones(2), torch.tensor([2.0, -2.0]))
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    function = staticmethod(uncertainty_calibration_error)

    def value(self) -> Tensor:
        """The error over everything that was counted."""
        bins = self.bins()
        total = bins.counts.sum()
        gaps = (bins.squared_error - bins.variance).abs()
        # 0/0 where nothing was counted.
        return (bins.counts * gaps).sum() / total


def _equal_mass(counts: Tensor, n_bins: int) -> Tensor:
    """The bin of each fine bin: by where the middle of its mass lies, in whole numbers."""
    before = counts.cumsum(0) - counts
    total = counts.sum().clamp_min(1)
    middle = (2 * before + counts) * n_bins
    return torch.div(middle, 2 * total, rounding_mode="floor").clamp_max(n_bins - 1)
