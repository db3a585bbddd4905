"""The figures of regression's calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_reg.metrics.reliability import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_reg.metrics.regression_calibration import UncertaintyBins

_BAR = "#9dbbe0"
_LINE = "#3b6ea8"
_IDEAL: dict[str, Any] = {"color": "#888888", "linestyle": "--", "linewidth": 1}


def draw_pit(counts: Tensor, *, title: str = "", ax: Any = None) -> tuple[Figure, Axes]:
    """The histogram of the probability integral transform, as a density, with the uniform one.

    Args:
        counts: (n_bins,) what was counted.
        title: a line above it.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure, axes = _axes(ax)
    counts = counts.detach().cpu()
    width = 1 / len(counts)
    density = (counts / counts.sum() / width).tolist()
    left = [b * width for b in range(len(counts))]
    axes.bar(left, density, width=width, align="edge", color=_BAR, edgecolor="white")
    axes.axhline(1.0, **_IDEAL)
    axes.text(0.03, 0.97, f"n = {int(counts.sum())}", va="top", transform=axes.transAxes)
    axes.set(xlim=(0, 1), xlabel="probability integral transform", ylabel="density", title=title)
    return figure, axes


def draw_quantiles(
    levels: Sequence[float], shares: Tensor, *, title: str = "", ax: Any = None
) -> tuple[Figure, Axes]:
    """Observed shares against the levels of the quantiles.

    Args:
        levels: Q numbers inside (0, 1).
        shares: (Q,) the share of targets at or below each quantile.
        title: a line above it.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure, axes = _axes(ax)
    points = sorted(zip(levels, shares.detach().cpu().tolist(), strict=True))
    axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", color=_LINE)
    axes.plot([0, 1], [0, 1], **_IDEAL)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="level", ylabel="observed share", title=title)
    return figure, axes


def draw_uncertainty(
    bins: UncertaintyBins, *, title: str = "", ax: Any = None
) -> tuple[Figure, Axes]:
    """Root mean squared error against root mean variance by bin.

    Args:
        bins: what was counted.
        title: a line above it.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure, axes = _axes(ax)
    promised = bins.variance.detach().cpu().sqrt().tolist()
    real = bins.squared_error.detach().cpu().sqrt().tolist()
    axes.plot(promised, real, marker="o", color=_LINE)
    ends = [min([*promised, *real], default=0.0), max([*promised, *real], default=1.0)]
    axes.plot(ends, ends, **_IDEAL)
    axes.set(xlabel="root mean variance", ylabel="root mean squared error", title=title)
    return figure, axes


def _axes(ax: Any) -> tuple[Any, Any]:
    figure = new_figure() if ax is None else ax.figure
    return figure, figure.add_subplot() if ax is None else ax
