"""Drawings of calibration: from counted states and histories, never from samples."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_reg.metrics.binning import ReliabilityBins
from lightning_reg.metrics.order_figures import draw_risk_coverage, draw_smooth_reliability
from lightning_reg.metrics.readings import Norm, error_of_bins
from lightning_reg.metrics.reliability import new_figure
from lightning_reg.metrics.smooth_calibration import SmoothReliability
from lightning_reg.metrics.uncertainty import accuracy_band
from lightning_reg.monitors.drawings import (
    COLORS,
    INK,
    Curve,
    curves_drawing,
    note,
    number,
    whole_numbers,
)
from lightning_reg.monitors.figures import Drawing
from lightning_reg.monitors.record import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR, _OVER, _UNDER = "#9dbbe0", "#e39a8e", "#8fc79b"
_ERRORS = {"l1": "ECE", "l2": "RMS CE", "max": "max CE"}
_MOST_TECHNIQUES = 5
_MOST_CLASSES = 9
_FAINT = 0.01


def reliability_drawing(
    bins: ReliabilityBins,
    *,
    norm: Norm = "l1",
    band: tuple[Tensor, Tensor] | None = None,
    title: str = "",
) -> Drawing:
    """A reliability diagram above the number of predictions in each bin.

    Args:
        bins: what was counted.
        norm: of the error that is written into the diagram.
        band: the ends of an interval of each bin's accuracy, (n_bins,) both.
        title: a line above it.
    """
    figure = new_figure(4.4, 5.6)
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    draw_bins(upper, bins, norm=norm, band=band)
    upper.set_title(f"{title}\n{_summary(bins, norm)}".lstrip(), fontsize="medium")
    figure.legend(loc="outside lower center", ncols=3, fontsize="x-small", frameon=False)
    draw_counts(lower, bins)
    lower.set_xlabel("confidence")
    numbers: dict[str, Any] = {name: values.tolist() for name, values in bins._asdict().items()}
    numbers["error"] = float(error_of_bins(bins, norm))
    if band is not None:
        numbers |= {"accuracy_low": band[0].tolist(), "accuracy_high": band[1].tolist()}
    return Drawing(figure, numbers)


def draw_bins(
    axes: Axes,
    bins: ReliabilityBins,
    *,
    norm: Norm = "l1",
    band: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Accuracy and the gap to confidence by bin; a bin without predictions stays empty."""
    filled = (bins.counts > 0).nonzero().flatten()
    width = 1 / len(bins.counts)
    accuracy, confidence = bins.accuracy[filled], bins.confidence[filled]
    left = filled * width
    style: dict[str, Any] = {"width": width, "align": "edge", "linewidth": 0.5}
    style["edgecolor"] = "white"
    axes.bar(left.tolist(), torch.minimum(accuracy, confidence).tolist(), color=_BAR, **style)
    for label, color, gap in (
        ("too confident", _OVER, confidence - accuracy),
        ("not confident enough", _UNDER, accuracy - confidence),
    ):
        low = torch.minimum(accuracy, confidence)
        axes.bar(
            left.tolist(),
            gap.clamp_min(0).tolist(),
            bottom=low.tolist(),
            color=color,
            label=label,
            **style,
        )
    ends = None
    if band is not None and len(filled):
        ends = torch.stack([accuracy - band[0][filled], band[1][filled] - accuracy]).clamp_min(0)
    axes.errorbar(
        (left + width / 2).tolist(),
        accuracy.tolist(),
        yerr=None if ends is None else ends.tolist(),
        fmt="o",
        color=INK,
        markersize=3,
        elinewidth=0.9,
        capsize=2,
        label="accuracy" if ends is None else "accuracy, 95 % interval",
    )
    axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")


def draw_counts(axes: Axes, bins: ReliabilityBins) -> None:
    """The predictions in each bin, on a logarithmic axis where one bin would hide the others."""
    counts = bins.counts.tolist()
    width = 1 / len(counts)
    left = [b * width for b in range(len(counts))]
    axes.bar(left, counts, width=width, align="edge", color=INK, edgecolor="white", linewidth=0.5)
    some = [count for count in counts if count]
    if some and max(some) > 50 * min(some):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    if not some:
        axes.set_ylim(0, 1)
    axes.set(ylabel="count", xlim=(0, 1))


def classwise_drawing(bins: ReliabilityBins, *, norm: Norm = "l1", title: str = "") -> Drawing:
    """Each class's probability against how often it occurs; the worst nine where there are more.

    Args:
        bins: (C, n_bins) of all classes.
        norm: of the errors.
        title: a line above.
    """
    errors = error_of_bins(bins, norm)
    classes = len(errors)
    # Of classes that nothing was counted of there is nothing to be seen.
    order = errors.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
    shown = order[:_MOST_CLASSES].tolist() if classes > _MOST_CLASSES else list(range(classes))
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(2.9 * columns + 0.3, 2.9 * rows + 0.8)
    for position, label in enumerate(shown):
        axes = figure.add_subplot(rows, columns, position + 1)
        own = ReliabilityBins(*(state[label] for state in bins))
        draw_bins(axes, own, norm=norm, band=band_of(own))
        axes.set_title(f"class {label}: {_ERRORS[norm]} {number(float(errors[label]))}", fontsize=9)
        axes.set_ylabel("frequency" if position % columns == 0 else "")
        axes.set_xlabel("probability" if position >= len(shown) - columns else "")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    labels = [text.replace("accuracy", "frequency") for text in labels]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize="small", frameon=False
    )
    which = f"the worst {len(shown)} of {classes} classes" if classes > len(shown) else "classes"
    mean = number(float(errors.nanmean()))
    figure.suptitle(f"{title}: {which}, mean {_ERRORS[norm]} {mean}".lstrip(": "), fontsize=10)
    numbers = {name: values.tolist() for name, values in bins._asdict().items()}
    return Drawing(figure, {**numbers, "errors": errors.tolist(), "shown": shown})


def temperature_drawing(
    before: ReliabilityBins,
    after: ReliabilityBins | None,
    *,
    norm: Norm = "l1",
    temperature: float | None = None,
    title: str = "",
) -> Drawing:
    """Two reliability diagrams side by side: raw, and as a fitted calibrator leaves it.

    Args:
        before: of raw predictions.
        after: of calibrated ones; ``None`` if nothing is fitted yet.
        norm: of the error that is written into the diagrams.
        temperature: that the calibrator divides logits by, if it does.
        title: a line above.
    """
    figure = new_figure(8.2, 5.4)
    axes = figure.subplots(2, 2, height_ratios=[3, 1], sharex=True)
    fitted = "calibrated" if temperature is None else f"calibrated, T = {number(temperature)}"
    columns = [("raw", before), (fitted, after)]
    numbers: dict[str, Any] = {"temperature": temperature}
    for column, (label, bins) in enumerate(columns):
        upper, lower = axes[0][column], axes[1][column]
        lower.set_xlabel("confidence")
        if bins is None:
            upper.set_title("not calibrated yet", fontsize="medium")
            upper.set(xlim=(0, 1), ylim=(0, 1.02))
            continue
        upper.set_title(f"{label}\n{_summary(bins, norm)}", fontsize="medium")
        draw_bins(upper, bins, norm=norm, band=band_of(bins))
        draw_counts(lower, bins)
        name = ("before", "after")[column]
        numbers[name] = {key: values.tolist() for key, values in bins._asdict().items()}
        numbers[name]["error"] = float(error_of_bins(bins, norm))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize="small", frameon=False
    )
    if title:
        figure.suptitle(title, fontsize="medium")
    return Drawing(figure, numbers)


def smooth_drawing(curve: SmoothReliability, error: float, title: str = "") -> Drawing:
    """The smooth reliability curve with the density of confidences below it."""
    figure = new_figure(4.4, 4.4)
    axes = figure.add_subplot()
    # Far from all predictions the kernel's tails say something, and it means nothing.
    near = curve.density > _FAINT * curve.density.max()
    accuracy = curve.accuracy.masked_fill(~near, float("nan"))
    draw_smooth_reliability(curve.confidence, accuracy, curve.density, ax=axes)
    note(axes, f"smECE {number(error)}\nbandwidth {number(float(curve.bandwidth))}")
    axes.set_title(title, fontsize="medium")
    numbers = {name: values.tolist() for name, values in curve._asdict().items()}
    return Drawing(figure, {**numbers, "error": error})


def risk_coverage_drawing(coverage: Tensor, risk: Tensor, area: float, title: str = "") -> Drawing:
    """The risk of the most confident share of predictions against that share."""
    figure = new_figure(4.6, 3.8)
    axes = figure.add_subplot()
    draw_risk_coverage(coverage, risk, ax=axes)
    # All predictions accepted: the error rate.
    axes.axhline(float(risk[-1]), color="#888888", linestyle="--", linewidth=1)
    top = max(1.25 * float(risk.max()), 0.01)
    axes.set_ylim(-0.02 * top, top)
    note(axes, f"AURC {number(area)}\nrisk of all {number(float(risk[-1]))}")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    numbers = {"coverage": coverage.tolist(), "risk": risk.tolist(), "area": area}
    return Drawing(figure, numbers)


def drift_drawing(history: Sequence[Entry], labels: Mapping[str, str], title: str = "") -> Drawing:
    """Calibration over epochs, a panel for each value."""
    panels = {}
    for name, label in labels.items():
        entries = [entry for entry in history if name in entry]
        epochs = [entry["epoch"] for entry in entries]
        panels[label] = [Curve("latest", epochs, [entry[name] for entry in entries])]
    return curves_drawing(panels, x_label="epoch", title=title)


def strength_drawing(history: Sequence[Entry], prefix: str, title: str = "") -> Drawing:
    """Each technique's strength over epochs with the calibration error, and one against the other.

    Args:
        history: entries with ``ece`` and, under ``prefix``, strengths by name.
        prefix: of the strengths.
        title: a line above.
    """
    names = sorted({key for entry in history for key in entry if key.startswith(prefix)})
    # Those that moved say the most.
    spread = {name: _spread([e[name] for e in history if name in e]) for name in names}
    shown = sorted(sorted(names, key=lambda name: -spread[name])[:_MOST_TECHNIQUES])
    figure = new_figure(9.4, 2.9 * max(1, len(shown)) + 0.4)
    layout: Any = figure.get_layout_engine()
    layout.set(wspace=0.08, hspace=0.06)
    grid = figure.subplots(max(1, len(shown)), 2, squeeze=False)
    numbers: dict[str, Any] = {}
    for row, name in zip(grid, shown, strict=False):
        entries = [entry for entry in history if name in entry]
        epochs, strengths = [e["epoch"] for e in entries], [e[name] for e in entries]
        errors = [e["ece"] for e in entries]
        label = name[len(prefix) :]
        numbers[label] = {"epoch": epochs, "strength": strengths, "ece": errors}
        _draw_together(row[0], epochs, strengths, errors, label)
        _draw_path(row[1], epochs, strengths, errors, label)
    if not shown:
        note(grid[0][0], "no technique among the Trainer's callbacks")
    if len(names) > len(shown):
        title = f"{title}: the {len(shown)} of {len(names)} techniques that moved most".lstrip(": ")
    if title:
        figure.suptitle(title, fontsize="medium")
    return Drawing(figure, numbers)


def band_of(bins: ReliabilityBins) -> tuple[Tensor, Tensor] | None:
    """The 95 % interval of each bin's accuracy; none without scipy."""
    return accuracy_band(bins) if importlib.util.find_spec("scipy") is not None else None


def _summary(bins: ReliabilityBins, norm: Norm) -> str:
    error = float(error_of_bins(bins, norm))
    return f"{_ERRORS[norm]} {number(error)}, n = {int(bins.counts.sum())}"


def _draw_together(
    axes: Axes, epochs: list[float], strengths: list[float], errors: list[float], label: str
) -> None:
    style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.4}
    axes.plot(epochs, strengths, color=COLORS[0], **style)
    axes.set_xlabel("epoch")
    axes.set_ylabel("strength", color=COLORS[0])
    axes.set_title(label, fontsize="small")
    other = axes.twinx()
    other.plot(epochs, errors, color=COLORS[1], **style)
    other.set_ylabel("ECE", color=COLORS[1])
    other.set_ylim(bottom=0)
    whole_numbers(axes, epochs)


def _draw_path(
    axes: Axes, epochs: list[float], strengths: list[float], errors: list[float], label: str
) -> None:
    axes.plot(strengths, errors, color="#bbbbbb", linewidth=1)
    dots = axes.scatter(strengths, errors, c=epochs, s=18, cmap="viridis", zorder=3)
    axes.figure.colorbar(dots, ax=axes, label="epoch")
    axes.set_title(label, fontsize="small")
    axes.set_xlabel("strength")
    axes.set_ylabel("ECE")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def _spread(values: list[float]) -> float:
    largest = max((abs(v) for v in values), default=0.0)
    return (max(values) - min(values)) / largest if largest else 0.0
