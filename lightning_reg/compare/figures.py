"""The figures of the report."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lightning_reg.compare.run import Run
from lightning_reg.compare.statistics import Row
from lightning_reg.compare.table import COLUMNS
from lightning_reg.metrics.calibration import ReliabilityBins
from lightning_reg.metrics.reliability import draw_reliability, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#444444", "#3b6fb6", "#d95f4c", "#4a9c5d", "#8e6bb0", "#c9972b", "#4fb0b5", "#b5577e")


def arms_of(runs: Sequence[Run]) -> list[str]:
    """The arms in the order in which they were run."""
    return list(dict.fromkeys(run.arm for run in runs))


def color(position: int) -> str:
    """The color of an arm."""
    return _COLORS[position % len(_COLORS)]


def pooled_bins(runs: Sequence[Run], arm: str) -> ReliabilityBins:
    """The bins of an arm over all its seeds."""
    total: ReliabilityBins | None = None
    for run in runs:
        if run.arm == arm:
            counts, confidence, correct = run.bins
            bins = ReliabilityBins(
                torch.tensor(counts, dtype=torch.int64),
                torch.tensor(confidence, dtype=torch.float64),
                torch.tensor(correct, dtype=torch.float64),
            )
            total = bins if total is None else total + bins
    assert total is not None
    return total


def reliability(runs: Sequence[Run]) -> Figure:
    """A reliability diagram for each arm."""
    arms = arms_of(runs)
    columns = min(4, len(arms))
    lines = -(-len(arms) // columns)
    figure = new_figure(3.4 * columns, 3.5 * lines)
    for position, arm in enumerate(arms):
        axes = figure.add_subplot(lines, columns, position + 1)
        draw_reliability(pooled_bins(runs, arm), title=arm, ax=axes)
    return figure


def accuracy_against_calibration(runs: Sequence[Run], rows: Sequence[Row]) -> Figure:
    """Each seed as a dot, each arm's mean as a ring: right and below is better."""
    figure = new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    for position, row in enumerate(rows):
        values = [run.values for run in runs if run.arm == row.arm]
        x, y = [100 * v["accuracy"] for v in values], [100 * v["ece"] for v in values]
        axes.scatter(x, y, s=18, color=color(position), alpha=0.5)
        axes.scatter(
            100 * row.cells["accuracy"].mean,
            100 * row.cells["ece"].mean,
            s=90,
            facecolors="none",
            edgecolors=color(position),
            linewidths=2,
            label=row.arm,
        )
    axes.set(xlabel="accuracy % (right is better)", ylabel="ECE % (low is better)")
    axes.legend(fontsize="small", frameon=False)
    axes.grid(alpha=0.25)
    return figure


def learning_curves(runs: Sequence[Run]) -> Figure:
    """Each metric over epochs: the mean over seeds and a band of one standard deviation."""
    figure = new_figure(11, 6.4)
    for panel, (name, (label, scale, _)) in enumerate(COLUMNS.items()):
        axes = figure.add_subplot(2, 2, panel + 1)
        for position, arm in enumerate(arms_of(runs)):
            curves = [[scale * e[name] for e in r.curves] for r in runs if r.arm == arm]
            epochs = range(1, min(len(c) for c in curves) + 1)
            at = [[c[e - 1] for c in curves] for e in epochs]
            mean = [statistics.fmean(v) for v in at]
            axes.plot(epochs, mean, color=color(position), label=arm)
            if len(curves) > 1:
                spread = [statistics.stdev(v) for v in at]
                low = [m - s for m, s in zip(mean, spread, strict=True)]
                high = [m + s for m, s in zip(mean, spread, strict=True)]
                axes.fill_between(epochs, low, high, color=color(position), alpha=0.15, lw=0)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.25)
        if panel == 0:
            axes.legend(fontsize="small", frameon=False)
    return figure


def as_image(figure: Figure, description: str) -> str:
    """An ``<img>`` that holds the picture itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{description}" src="data:image/png;base64,{data}">'
