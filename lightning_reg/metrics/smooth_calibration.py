"""The smooth calibration error: a kernel in place of bins, its width the error itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.fine_histogram import Cells, OrderMetric
from lightning_reg.metrics.inputs import Task

__all__ = ["SmoothCalibrationError", "smooth_calibration_error"]

MIN_BANDWIDTH = 1e-3
# exp(-x^2 / 2) is below 1e-17 from here on.
_NEGLIGIBLE = 8.9
# Points of the mesh: at the least bandwidth allowed, 16 of them to a bandwidth.
_MESH = 2**14
_LEAST_ALLOWED = 16 / _MESH
_BLOCK = 2**22


class SmoothReliability(NamedTuple):
    """The smooth reliability curve.

    Attributes:
        confidence: (n,) points of [0, 1].
        accuracy: (n,) the kernel-weighted mean correctness there; NaN where no prediction is near.
        density: (n,) the kernel density of the confidences; its integral is 1.
        bandwidth: the width of the kernel.
    """

    confidence: Tensor
    accuracy: Tensor
    density: Tensor
    bandwidth: Tensor


class CosineSeries:
    """Weights at points of [0, 1] as a cosine series, as far as a bandwidth needs it.

    The Gaussian kernel that is reflected at 0 and 1, again and again, is the heat kernel of the
    interval, and cosines are its eigenfunctions: smoothing with bandwidth s multiplies
    coefficient k by ``exp(-(pi k s)^2 / 2)``. A weight at exactly 0 or 1 keeps its full weight.

    Args:
        points: (n,) in [0, 1].
        weights: (n,) or (m, n).
    """

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        self.points = points
        self.weights = torch.atleast_2d(weights)
        self._known = self.weights.new_zeros(len(self.weights), 0)

    def smoothed(self, bandwidth: float) -> Tensor:
        """(m, K) coefficients of the smoothed weights; the rest is negligible."""
        needed = int(_NEGLIGIBLE / (math.pi * bandwidth)) + 2
        if self._known.shape[1] < needed:
            more = [self._known]
            # Twice as many as are needed now: the search goes to smaller bandwidths next.
            step = max(1, _BLOCK // max(1, len(self.points)))
            for first in range(self._known.shape[1], 2 * needed, step):
                order = torch.arange(first, min(first + step, 2 * needed)).to(self.points)
                cosines = (math.pi * order.unsqueeze(1) * self.points).cos()
                more.append(self.weights @ cosines.T)
            self._known = torch.cat(more, 1)
        order = torch.arange(needed).to(self.points)
        damping = torch.exp(-(math.pi * bandwidth * order).square() / 2)
        smoothed: Tensor = self._known[:, :needed] * damping
        return smoothed


def on_mesh(coefficients: Tensor, intervals: int = _MESH) -> Tensor:
    """(m, intervals + 1) the values of cosine series at equal steps over [0, 1]."""
    spectrum = torch.zeros(*coefficients.shape[:-1], intervals + 1, dtype=coefficients.dtype)
    spectrum = spectrum.to(coefficients.device)
    spectrum[..., : coefficients.shape[-1]] = coefficients
    # The even extension of period 2: each coefficient stands for k and -k.
    values: Tensor = torch.fft.irfft(spectrum, n=2 * intervals, norm="forward")
    return values[..., : intervals + 1]


def absolute_integral(coefficients: Tensor) -> Tensor:
    """The integral over [0, 1] of the absolute value of a cosine series.

    Between zeros the antiderivative is known in closed form. At a zero its slope vanishes, so that
    a zero which is off by d changes the integral by O(d^2): linear interpolation in the mesh
    leaves an error of the order 1e-12.
    """
    values = on_mesh(coefficients)
    left, right = values[:-1], values[1:]
    crossed = ((left * right < 0) | ((left == 0) & (right != 0))).nonzero().flatten()
    steps = left[crossed] / (left[crossed] - right[crossed])
    zeros = (crossed + torch.nan_to_num(steps)) / _MESH
    ends = torch.cat([zeros.new_tensor([0.0]), zeros, zeros.new_tensor([1.0])])
    order = torch.arange(1, len(coefficients)).to(coefficients)
    waves = coefficients[1:] / (math.pi * order)
    parts = [(math.pi * block.unsqueeze(1) * order).sin() @ waves for block in ends.split(1024)]
    integral = coefficients[0] * ends + 2 * torch.cat(parts)
    return integral.diff().abs().sum()


def fixed_point(error: Callable[[float], Tensor], least: float) -> float:
    """The bandwidth that equals the error at it; ``least`` if that is below.

    The error does not increase with the bandwidth, so there is one crossing: halved down from 1
    until it is enclosed, then bisected to rounding.
    """
    high = 1.0
    while high > least and float(error(high)) < high:
        low, high = max(high / 2, least), high
        if float(error(low)) >= low:
            return _bisect(error, low, high)
        high = low
    return high


def _bisect(error: Callable[[float], Tensor], low: float, high: float) -> float:
    # Regula falsi with the Illinois correction: each end is halved if it stays twice.
    at_low, at_high = float(error(low)) - low, float(error(high)) - high
    kept = 0
    for _ in range(100):
        if high - low < 1e-13 or at_low <= 0:
            break
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        at_middle = float(error(middle)) - middle
        if abs(at_middle) < 1e-14 or not low < middle < high:
            return middle
        if at_middle > 0:
            low, at_low = middle, at_middle
            at_high = at_high / 2 if kept == 1 else at_high
            kept = 1
        else:
            high, at_high = middle, at_middle
            at_low = at_low / 2 if kept == -1 else at_low
            kept = -1
    return low


def smooth_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    bandwidth: float | None = None,
    min_bandwidth: float = MIN_BANDWIDTH,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The smooth calibration error, smECE.

    With confidences ``p_i``, correctness ``y_i`` and the reflected Gaussian kernel ``K_s`` on
    [0, 1] of bandwidth s, ``smECE_s = int_0^1 |1/N sum_i (y_i - p_i) K_s(t, p_i)| dt``. It falls as
    s grows; smECE is its value at the one s with ``smECE_s = s``, or at ``min_bandwidth`` if that
    is larger.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, judged by the top class; (N, ...) of the positive
            class for ``"binary"``.
        target: class indices (N, ...), or soft targets of the shape of ``preds``.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        bandwidth: a fixed s in place of the fixed point.
        min_bandwidth: the least s; relplot's 0.001.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([1.0, 1.0, 1.0, 1.0])
        >>> smooth_calibration_error(
        ...     probabilities, torch.tensor([1, 1, 1, 0]), from_logits=False, task="binary"
        ... )
        tensor(0.2500, dtype=torch.float64)
    """
    metric = SmoothCalibrationError(
        from_logits=from_logits,
        task=task,
        bandwidth=bandwidth,
        min_bandwidth=min_bandwidth,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def smooth_error(
    cells: Cells, bandwidth: float | None, min_bandwidth: float
) -> tuple[Tensor, float]:
    """The smooth calibration error and its bandwidth."""
    points, weights = _residuals(cells)
    series = CosineSeries(points, weights)

    def error(width: float) -> Tensor:
        return absolute_integral(series.smoothed(width)[0])

    if bandwidth is None:
        bandwidth = fixed_point(error, min_bandwidth)
    return error(bandwidth), bandwidth


def smooth_reliability(cells: Cells, bandwidth: float, intervals: int = 256) -> SmoothReliability:
    """The kernel-weighted mean correctness over [0, 1].

    Args:
        cells: the predictions.
        bandwidth: the width of the kernel.
        intervals: a power of 2; the curve has one point more.
    """
    right, wrong = cells.by_correctness()
    zero = torch.zeros_like(cells.correct_sum)
    weights = torch.stack(
        [torch.cat([cells.correct_sum, zero]), torch.cat([cells.correct_sum, _wrong(cells)])]
    )
    series = CosineSeries(torch.cat([right, wrong]), weights / cells.total)
    values = on_mesh(series.smoothed(bandwidth))[:, :: _MESH // intervals]
    correct, density = values[0], values[1].clamp_min(0)
    # Below this the quotient is one of rounding errors.
    near = density > 1e-9 * density.max()
    accuracy = torch.where(near, (correct / density).clamp(0, 1), float("nan"))
    points = torch.arange(intervals + 1).to(density) / intervals
    return SmoothReliability(points, accuracy, density, density.new_tensor(bandwidth))


class SmoothCalibrationError(OrderMetric):
    """The smooth calibration error (smECE): no bins, and no width to choose.

    Błasiok & Nakkiran (2023), Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing,
    arXiv:2309.12236. See :func:`smooth_calibration_error` for the formula. ``curve()`` and
    ``plot()`` give the smooth reliability diagram.

    Computed in the cosine series of the residuals, in which the reflected kernel is exact. Apple's
    relplot 1.0.3 (ml-calibration) rounds to a grid, bisects the bandwidth to 1/1024 and reflects
    the grid about its first and last points, which halves the weight of predictions at exactly 0
    and 1 against that of the others. With no prediction there the two agree to relplot's
    discretization, a few 1e-4; with many, this is the paper's definition and relplot is not.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` (top label) or ``"binary"`` (positive class).
        bandwidth: a fixed bandwidth in place of the fixed point.
        min_bandwidth: the least bandwidth, relplot's 0.001: errors below it are read at it.
        exact: keep every confidence instead of a histogram; see
            :class:`~lightning_reg.metrics.fine_histogram.OrderMetric`.
        resolution: the number of cells of the histogram.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        From the histogram the right and the wrong predictions of a cell of width w stand at the
        mean of their confidences, so that the first order of the error vanishes. With bandwidth s
        it is at most the mean over predictions of ``w^2/8 (0.97/s^2 + 1.6/s)``, which is
        ``error_bound()``; at the fixed point the error of the value is not more than that.
        ``compute`` costs ``6/s`` cosines for each cell that is filled.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import SmoothCalibrationError
        >>> metric = SmoothCalibrationError(from_logits=False, task="binary")
        >>> metric.update(torch.ones(4), torch.tensor([1, 1, 1, 0]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    function = staticmethod(smooth_calibration_error)
    papers = (
        Paper(
            "Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing",
            "Błasiok & Nakkiran",
            2023,
            "2309.12236",
        ),
    )
    plot_upper_bound = 1.0

    def __init__(
        self,
        *,
        from_logits: bool,
        bandwidth: float | None = None,
        min_bandwidth: float = MIN_BANDWIDTH,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        _check(self, bandwidth, min_bandwidth)
        self.bandwidth = bandwidth
        self.min_bandwidth = min_bandwidth

    def statistic(self, cells: Cells) -> Tensor:
        """The error at the fixed bandwidth, or at the fixed point."""
        return smooth_error(cells, self.bandwidth, self.min_bandwidth)[0]

    def bound(self, cells: Cells) -> Tensor:
        """The second order of moving predictions to the means of their cells."""
        _, width = smooth_error(cells, self.bandwidth, self.min_bandwidth)
        moved = (cells.sizes * cells.spread()).sum() / (2 * cells.total)
        off = float(moved) * _kernel_change(width)
        if self.bandwidth is None:
            # The exact fixed point can lie lower, where moving a prediction changes more.
            for _ in range(50):
                lower = max(width - off, self.min_bandwidth)
                off = float(moved) * _kernel_change(lower)
        return torch.full_like(moved, min(off, 1.0))

    def curve(self) -> SmoothReliability:
        """The smooth reliability curve; of all ranks only within ``sync_context()``."""
        cells = self.cells()
        if not len(cells.counts):
            raise ArgumentError(
                self, "has counted nothing to draw", cure="metric.update(logits, target)"
            )
        _, width = smooth_error(cells, self.bandwidth, self.min_bandwidth)
        return smooth_reliability(cells, width)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """The smooth reliability diagram, drawn from the state.

        Args:
            val: a :class:`SmoothReliability` to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.order_figures import draw_smooth_reliability

        curve = self.curve() if val is None else val
        label = "" if val is not None else f"smECE {float(self.value()):.4f}"
        return draw_smooth_reliability(*curve[:3], label=label, ax=ax)


def _residuals(cells: Cells) -> tuple[Tensor, Tensor]:
    """Right predictions pull up at their mean confidence, wrong ones down at theirs."""
    right, wrong = cells.by_correctness()
    up = cells.correct_sum - cells.joint_sum
    down = cells.joint_sum - cells.confidence_sum
    return torch.cat([right, wrong]), torch.cat([up, down]) / cells.total


def _kernel_change(bandwidth: float) -> float:
    """No more is the integral over t of ``|d^2/dp^2 (c - p) K(t, p)|``, c of 0 or 1."""
    slope = math.sqrt(2 / math.pi) / bandwidth
    curvature = 4 * math.exp(-0.5) / math.sqrt(2 * math.pi) / bandwidth**2
    return curvature + 2 * slope


def _wrong(cells: Cells) -> Tensor:
    return (cells.sizes - cells.correct_sum).clamp_min(0)


def _check(owner: object, bandwidth: float | None, min_bandwidth: float) -> None:
    cure = f"min_bandwidth={MIN_BANDWIDTH}"
    check_range(owner, "min_bandwidth", min_bandwidth, _LEAST_ALLOWED, 1, cure=cure)
    if bandwidth is not None:
        check_range(owner, "bandwidth", bandwidth, _LEAST_ALLOWED, 1, cure="bandwidth=0.05")
