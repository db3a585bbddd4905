"""Drawings of entropy: of right and wrong predictions, of classes, of attention heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_reg.metrics.entropy_separation import EntropyHistogram, draw_entropies
from lightning_reg.metrics.reliability import new_figure
from lightning_reg.monitors.drawings import COLORS, number
from lightning_reg.monitors.figures import Drawing

_MOST_BARS = 30
_MOST_WRITTEN = 12


def split_drawing(histogram: EntropyHistogram, separation: float, title: str = "") -> Drawing:
    """The distributions of entropy of right and of wrong predictions."""
    figure = new_figure(4.8, 3.6)
    axes = figure.add_subplot()
    draw_entropies(histogram, ax=axes)
    axes.set_title(f"{title}\nseparation {number(separation)}".lstrip(), fontsize="medium")
    numbers: dict[str, Any] = {name: v.tolist() for name, v in histogram._asdict().items()}
    return Drawing(figure, {**numbers, "separation": separation})


def classes_drawing(entropies: Tensor, counts: Tensor, title: str = "") -> Drawing:
    """The mean entropy of predictions for each true class, against the most that is possible.

    Args:
        entropies: (C,) in nats; NaN for a class without samples.
        counts: (C,) the samples of each class.
        title: a line above.
    """
    classes = len(entropies)
    seen = (counts > 0).nonzero().flatten()
    order = seen
    if len(seen) > _MOST_BARS:
        # The most and the least undecided, in the order of their entropy.
        ranked = seen[entropies[seen].argsort(descending=True)]
        half = _MOST_BARS // 2
        order = torch.cat([ranked[:half], ranked[-half:]])
    figure = new_figure(max(4.2, 1.2 + 0.26 * len(order)), 3.6)
    axes = figure.add_subplot()
    axes.bar(range(len(order)), entropies[order].tolist(), color=COLORS[0])
    axes.axhline(math.log(classes), color="#888888", linestyle="--", linewidth=1)
    few = len(order) <= _MOST_BARS // 2
    axes.set_xticks(
        range(len(order)),
        [str(k) for k in order.tolist()],
        rotation=0 if few else 90,
        fontsize="small" if few else "x-small",
    )
    axes.set(ylim=(0, 1.08 * math.log(classes)), xlabel="true class", ylabel="mean entropy (nats)")
    if len(seen) > len(order):
        axes.set_xlabel(f"true class: the {_MOST_BARS} of {len(seen)} with most and least entropy")
        axes.axvline(len(order) / 2 - 0.5, color="#888888", linewidth=0.8)
    axes.set_title(f"{title}; dashed: log C".lstrip("; "), fontsize="medium")
    numbers = {"entropy": entropies.tolist(), "count": counts.tolist()}
    return Drawing(figure, numbers)


def attention_drawing(entropies: Tensor, names: list[str], title: str = "") -> Drawing:
    """The mean entropy of attention of each head and layer, with the numbers where they fit.

    Args:
        entropies: (L, H); NaN where nothing counted.
        names: of the layers.
        title: a line above.
    """
    layers, heads = entropies.shape
    figure = new_figure(2.6 + 0.55 * min(heads, 24), 1.4 + 0.42 * min(layers, 32))
    axes = figure.add_subplot()
    image = axes.imshow(entropies.numpy(), aspect="auto", vmin=0, cmap="viridis")
    figure.colorbar(image, ax=axes, label="entropy")
    axes.set_xlabel("head")
    axes.set_yticks(range(layers), names, fontsize="x-small")
    step = max(1, heads // 16)
    axes.set_xticks(range(0, heads, step))
    if heads <= _MOST_WRITTEN:
        largest = float(entropies.nan_to_num().max()) or 1.0
        for layer in range(layers):
            for head in range(heads):
                value = float(entropies[layer, head])
                color = "black" if value > 0.6 * largest else "white"
                text = "–" if value != value else f"{value:.2f}"
                axes.text(head, layer, text, ha="center", va="center", fontsize=7, color=color)
    mean = float(entropies.nanmean())
    axes.set_title(f"{title}\nmean {number(mean)}".lstrip(), fontsize="medium")
    return Drawing(figure, {"entropy": entropies.tolist(), "layers": names, "mean": mean})
