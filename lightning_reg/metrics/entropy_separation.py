"""The entropy of right and of wrong predictions, and how far they are apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.dense import DenseMetric
from lightning_reg.metrics.entropy import entropy_of_rows
from lightning_reg.metrics.inputs import Rows, Task, high_precision
from lightning_reg.metrics.reliability import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EntropyHistogram", "EntropySeparation", "draw_entropies", "entropy_separation"]


class EntropyHistogram(NamedTuple):
    """Predictions by their entropy in units of ``log C``: equal bins over [0, 1], the last closed.

    Attributes:
        right: (n_bins,) int64, the right predictions in each bin.
        wrong: (n_bins,) int64, the wrong ones.
    """

    right: Tensor
    wrong: Tensor


def entropy_separation(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    n_bins: int = 200,
    class_dim: int = 1,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""How well entropy tells wrong predictions from right ones.

    The area under the ROC curve of entropy as a detector of errors: the share of pairs of a wrong
    and a right prediction in which the wrong one has the higher entropy, pairs in one bin counting
    a half. 0.5 says that entropy tells nothing, 1 that every error is more uncertain than every
    right answer. With bins it is within :meth:`EntropySeparation.bound` of the value of the
    samples, and does not depend on their order.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, (N, ...) of the positive class for ``"binary"``.
        target: (N, ...) class indices.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        n_bins: equal bins of entropy over [0, log C].
        class_dim: the dimension of the classes, where it is not 1.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN unless there are right and wrong predictions.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> preds = torch.tensor([[1.0, 0.0], [0.6, 0.4]])  # sure and right, unsure and wrong
        >>> entropy_separation(preds, torch.tensor([0, 1]), from_logits=False)
        tensor(1., dtype=torch.float64)
    """
    metric = EntropySeparation(
        from_logits=from_logits,
        task=task,
        n_bins=n_bins,
        class_dim=class_dim,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class EntropySeparation(DenseMetric):
    """The distributions of entropy of right and wrong predictions, and how far they are apart.

    See :func:`entropy_separation` for the value. The state is two vectors of ``n_bins`` int64
    counts; :meth:`histogram` gives them and :meth:`plot` draws them.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        n_bins: equal bins of entropy over [0, log C].
        kwargs: ``class_dim``, ``ignore_index``, ``validate_args``, and those of
            ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import EntropySeparation
        >>> metric = EntropySeparation(from_logits=False)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.6, 0.4]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    function = staticmethod(entropy_separation)
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    right: Tensor
    wrong: Tensor

    def __init__(self, *, from_logits: bool, n_bins: int = 200, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 2:
            raise ArgumentError(
                self, f"`n_bins` must be a whole number from 2, got {n_bins!r}", cure="n_bins=200"
            )
        self.n_bins = n_bins
        self.add_count("right", n_bins)
        self.add_count("wrong", n_bins)

    def accumulate(self, rows: Rows) -> None:
        """Add the block's counts."""
        if rows.targets is None or rows.targets.is_floating_point():
            raise ArgumentError(
                self, "needs class indices as targets", cure="metric.update(logits, target)"
            )
        share = entropy_of_rows(rows.scores, self.from_logits, normalized=True)
        index = (share * self.n_bins).long().clamp(0, self.n_bins - 1)
        if rows.scores.ndim == 1:
            top = rows.scores >= (0.0 if self.from_logits else 0.5)
        else:
            top = rows.scores.argmax(1)
        right = (top == rows.targets).long()
        self.right = self.right.index_add(0, index, right)
        self.wrong = self.wrong.index_add(0, index, 1 - right)

    def histogram(self) -> EntropyHistogram:
        """What has been counted: by this process, or by all within ``sync_context()``."""
        return EntropyHistogram(self.right, self.wrong)

    def value(self) -> Tensor:
        """The separation over everything that was counted."""
        right, wrong = self._shares()
        return (wrong * (right.cumsum(0) - right / 2)).sum()

    def bound(self) -> Tensor:
        """How far :meth:`value` may be from that of the samples themselves: half the tied pairs."""
        right, wrong = self._shares()
        return (right * wrong).sum() / 2

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Both distributions, drawn from the state.

        Args:
            val: a histogram to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        return draw_entropies(self.histogram() if val is None else val, ax=ax)

    def _shares(self) -> tuple[Tensor, Tensor]:
        return (
            high_precision(self.right) / self.right.sum(),
            high_precision(self.wrong) / self.wrong.sum(),
        )


def draw_entropies(
    histogram: EntropyHistogram, *, title: str = "", bars: int = 40, ax: Any = None
) -> tuple[Figure, Axes]:
    """The distributions of entropy of right and wrong predictions, each with area 1.

    Args:
        histogram: what was counted.
        title: a line above it.
        bars: at most as many bars are drawn: bins are put together.
        ax: a matplotlib axes to draw into; a new figure without.

    Returns:
        The figure and the axes.
    """
    figure = new_figure() if ax is None else ax.figure
    axes = figure.add_subplot() if ax is None else ax
    bins = len(histogram.right)
    joined = math.ceil(bins / bars)
    for counts, color, name in (
        (histogram.right, "#3b6ea8", "right"),
        (histogram.wrong, "#d95f4c", "wrong"),
    ):
        parts = [float(p.sum()) for p in counts.detach().cpu().split(joined)]
        total = max(sum(parts), 1.0)
        left = [b * joined / bins for b in range(len(parts))]
        widths = [min(joined / bins, 1 - x) for x in left]
        heights = [p / total / w for p, w in zip(parts, widths, strict=True)]
        label = f"{name}, n = {int(sum(parts))}"
        axes.bar(left, heights, width=widths, align="edge", color=color, alpha=0.5, label=label)
    axes.set(xlim=(0, 1), xlabel="entropy / log C", ylabel="density", title=title)
    axes.legend(fontsize="x-small")
    return figure, axes
