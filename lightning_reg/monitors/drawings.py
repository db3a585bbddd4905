"""Kinds of drawings that monitors share: curves, histograms, heat maps, and their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning_reg.metrics.reliability import new_figure
from lightning_reg.monitors.figures import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#3b6fb6", "#d95f4c", "#4a9c5d", "#8e6bb0", "#c9972b", "#4fb0b5", "#b5577e", "#666666")
INK = "#444444"
_MANY_POINTS = 40


class Curve(NamedTuple):
    """A named line.

    Attributes:
        label: its name in the legend.
        x: positions.
        y: values; NaN leaves a gap.
        style: of the line, as matplotlib writes it.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "-"


def curves_drawing(
    panels: Mapping[str, Sequence[Curve]], *, x_label: str, title: str = "", columns: int = 2
) -> Drawing:
    """Lines over a common axis, a panel for each quantity.

    Args:
        panels: by the label of the y axis.
        x_label: of the common axis.
        title: a line above.
        columns: panels in a row.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.2 * columns + 0.4, 2.6 * rows + 0.5)
    for position, (label, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, position + 1)
        draw_curves(axes, curves)
        axes.set_ylabel(label)
        if position >= len(panels) - columns:
            axes.set_xlabel(x_label)
    if title:
        figure.suptitle(title, fontsize="medium")
    numbers = {
        label: {curve.label: {"x": list(curve.x), "y": list(curve.y)} for curve in curves}
        for label, curves in panels.items()
    }
    return Drawing(figure, numbers)


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Lines with their latest value in the legend."""
    for position, curve in enumerate(curves):
        marker = "o" if len(curve.x) <= _MANY_POINTS else ""
        axes.plot(
            curve.x,
            curve.y,
            curve.style,
            color=COLORS[position % len(COLORS)],
            marker=marker,
            markersize=3,
            linewidth=1.4,
            label=f"{curve.label} {number(curve.y[-1])}" if len(curve.y) else curve.label,
        )
    axes.grid(alpha=0.25)
    axes.ticklabel_format(axis="y", useOffset=False)
    if any(len(curve.x) for curve in curves):
        axes.legend(fontsize="x-small", frameon=False)
        whole_numbers(axes, [x for curve in curves for x in curve.x])


def whole_numbers(axes: Axes, positions: Sequence[float]) -> None:
    """Epochs are whole: no ticks between them, and room around a single one."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = min(positions), max(positions)
    room = max(0.5, 0.03 * (high - low)) if high == low else 0.03 * (high - low)
    axes.set_xlim(low - room, high + room)


def note(axes: Axes, text: str, x: float = 0.04, y: float = 0.96) -> None:
    """A line of text in the upper left corner, readable on any background."""
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
    axes.text(x, y, text, transform=axes.transAxes, va="top", fontsize="small", bbox=box)


def number(value: float) -> str:
    """A number as it is written into a figure: four digits, not rounded away to zero."""
    if value != value or value in (float("inf"), -float("inf")):
        return "–" if value != value else ("∞" if value > 0 else "-∞")
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.3g}"
