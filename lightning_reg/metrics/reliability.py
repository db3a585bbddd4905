"""The reliability diagram."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_reg.engine.optional import require
from lightning_reg.metrics.binning import ReliabilityBins
from lightning_reg.metrics.readings import Norm, error_of_bins
from lightning_reg.metrics.uncertainty import accuracy_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GAP = "#d95f4c"
_BAR = "#9dbbe0"


def new_figure(width: float = 4.2, height: float = 4.2) -> Figure:
    """A figure that belongs to no window.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the line that installs it.
    """
    figure = require("matplotlib.figure", "demo", "A reliability diagram").Figure
    made: Figure = figure(figsize=(width, height), layout="constrained")
    return made


def draw_reliability(
    bins: ReliabilityBins,
    *,
    norm: Norm = "l1",
    title: str = "",
    ax: Any = None,
    level: float | None = None,
) -> tuple[Figure, Axes]:
    """Accuracy against confidence by bin, the gap between them, and the share of each bin.

    Args:
        bins: what was counted.
        norm: the error that is written into the diagram.
        title: a line above it.
        ax: a matplotlib axes to draw into; a new figure without.
        level: draw the Clopper-Pearson interval of each bin's accuracy at this level, 0.95 for
            example; needs scipy, and labels that are not soft.

    Returns:
        The figure and the axes.
    """
    figure = new_figure() if ax is None else ax.figure
    axes = figure.add_subplot() if ax is None else ax
    bins = ReliabilityBins(*(state.detach().cpu() for state in bins))
    filled = (bins.counts > 0).nonzero().flatten().tolist()
    width = 1 / len(bins.counts)
    left = [b * width for b in filled]
    accuracy = bins.accuracy[filled].tolist()
    confidence = bins.confidence[filled].tolist()
    share = (bins.counts[filled] / bins.counts.sum()).tolist()
    low = [min(pair) for pair in zip(accuracy, confidence, strict=True)]
    gap = [abs(a - c) for a, c in zip(accuracy, confidence, strict=True)]
    style: dict[str, Any] = {
        "width": width,
        "align": "edge",
        "linewidth": 0.5,
        "edgecolor": "white",
    }
    axes.bar(left, accuracy, color=_BAR, label="accuracy", **style)
    axes.bar(left, gap, bottom=low, color=_GAP, alpha=0.5, label="gap", **style)
    if level is not None:
        _draw_band(axes, bins, filled, width, level)
    axes.step(
        [0.0, *[x for b in left for x in (b, b, b + width, b + width)], 1.0],
        [0.0, *[y for s in share for y in (0.0, s, s, 0.0)], 0.0],
        color="#444444",
        linewidth=0.8,
        label="share of samples",
    )
    axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1)
    error = float(error_of_bins(bins, norm))
    label = {"l1": "ECE", "l2": "RMS calibration error", "max": "maximum calibration error"}[norm]
    axes.text(0.04, 0.95, f"{label} {error:.4f}\nn = {int(bins.counts.sum())}", va="top")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=title)
    axes.legend(loc="lower right", fontsize="x-small", framealpha=0.9)
    return figure, axes


def _draw_band(
    axes: Axes, bins: ReliabilityBins, filled: list[int], width: float, level: float
) -> None:
    lower, upper = (end[filled].tolist() for end in accuracy_band(bins, level))
    accuracy = bins.accuracy[filled].tolist()
    ends = [
        [a - low for a, low in zip(accuracy, lower, strict=True)],
        [high - a for a, high in zip(accuracy, upper, strict=True)],
    ]
    middle = [(b + 0.5) * width for b in filled]
    style: dict[str, Any] = {"fmt": "none", "ecolor": "#333333", "elinewidth": 1, "capsize": 2}
    axes.errorbar(middle, accuracy, yerr=ends, label=f"{level:.0%} interval", **style)
