"""Figures of metrics that depend on the order of confidences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.metrics.reliability import new_figure

_LINE = "#3b6fb6"
_GUIDE = {"color": "#888888", "linestyle": "--", "linewidth": 1}


def draw_risk_coverage(coverage: Tensor, risk: Tensor, *, ax: Any = None) -> tuple[Any, Any]:
    """The risk of the accepted against their share.

    Args:
        coverage: (n,) ascending.
        risk: (n,) the mean error of the share that is accepted.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure, axes = _axes(ax)
    axes.plot(_list(coverage), _list(risk), color=_LINE)
    axes.set(xlim=(0, 1), xlabel="coverage", ylabel="risk of the accepted")
    axes.set_ylim(bottom=0)
    return figure, axes


def draw_cumulative(share: Tensor, difference: Tensor, *, ax: Any = None) -> tuple[Any, Any]:
    """The cumulative difference of correctness and confidence.

    Args:
        share: (n,) the share of predictions up to each.
        difference: (n,) the cumulative difference there.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure, axes = _axes(ax)
    axes.axhline(0, **_GUIDE)
    axes.plot(_list(share), _list(difference), color=_LINE)
    axes.set(
        xlim=(0, 1),
        xlabel="share of predictions, by rising confidence",
        ylabel="correctness - confidence, summed",
    )
    return figure, axes


def draw_mass_bins(confidence: Tensor, accuracy: Tensor, *, ax: Any = None) -> tuple[Any, Any]:
    """Accuracy against confidence of bins that hold the same number of predictions.

    Args:
        confidence: (n_bins,) the mean of each; NaN in an empty one.
        accuracy: (n_bins,) the mean of each.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure, axes = _axes(ax)
    filled = torch.isfinite(accuracy)
    axes.plot([0, 1], [0, 1], **_GUIDE)
    axes.plot(_list(confidence[filled]), _list(accuracy[filled]), color=_LINE, marker="o")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    return figure, axes


def draw_smooth_reliability(
    confidence: Tensor, accuracy: Tensor, density: Tensor, *, label: str = "", ax: Any = None
) -> tuple[Any, Any]:
    """The smooth reliability curve, and how the predictions are spread along it.

    Args:
        confidence: (n,) the points of the curve.
        accuracy: (n,) the smoothed accuracy there; NaN where no prediction is near.
        density: (n,) the smoothed density of confidences.
        label: a line of text in the corner.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure, axes = _axes(ax)
    axes.fill_between(
        _list(confidence), _list(density / (4 * density.max())), color=_LINE, alpha=0.2
    )
    axes.plot([0, 1], [0, 1], **_GUIDE)
    axes.plot(_list(confidence), _list(accuracy), color=_LINE)
    axes.text(0.04, 0.95, label, va="top")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    return figure, axes


def draw_groups(
    names: list[str], values: list[float], *, label: str = "", ax: Any = None
) -> tuple[Any, Any]:
    """A bar for each group.

    Args:
        names: of the groups.
        values: of the groups; NaN where there are no samples.
        label: of the values.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure, axes = _axes(ax)
    axes.barh(names, values, color=_LINE)
    axes.invert_yaxis()
    axes.set(xlabel=label)
    return figure, axes


def draw_utilities(threshold: Tensor, utility: Tensor, *, ax: Any = None) -> tuple[Any, Any]:
    """The utility of each class against the threshold, and their mean.

    Args:
        threshold: (n,) distances.
        utility: (T, n) of each class.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure, axes = _axes(ax)
    for row in utility:
        axes.plot(_list(threshold), _list(row), color="#bbbbbb", linewidth=0.5)
    axes.plot(_list(threshold), _list(utility.mean(0)), color=_LINE)
    axes.set(ylim=(0, 1), xlabel="distance threshold", ylabel="utility of each class")
    return figure, axes


def _axes(ax: Any) -> tuple[Any, Any]:
    if ax is not None:
        return ax.figure, ax
    figure = new_figure()
    return figure, figure.add_subplot()


def _list(values: Tensor) -> list[float]:
    numbers: list[float] = values.detach().cpu().tolist()
    return numbers
