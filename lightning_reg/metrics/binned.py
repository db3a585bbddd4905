"""The one state from which calibration errors and the parts of the Brier score are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.metrics.binning import (
    BinMoments,
    Grid,
    ReliabilityBins,
    add_class_predictions,
    add_predictions,
)
from lightning_reg.metrics.exact import ExactMetric
from lightning_reg.metrics.inputs import (
    WIDE_BLOCK,
    AnyTask,
    Rows,
    high_precision,
    probabilities,
    probability_of,
)

View = Literal["top_label", "top_k", "classwise", "positive"]
Average = Literal["macro", "micro", "none"]
VIEWS: dict[str, tuple[View, ...]] = {
    "multiclass": ("top_label", "top_k", "classwise"),
    "binary": ("positive", "top_label"),
    "multilabel": ("classwise",),
}
AVERAGES = ("macro", "micro", "none")


class Judged(NamedTuple):
    """Predictions as confidences and what became of them.

    Attributes:
        confidence: (N,) in high precision.
        correct: (N,) bool, or floats in [0, 1] with soft targets.
    """

    confidence: Tensor
    correct: Tensor


def judge(
    rows: Rows, from_logits: bool, view: View, top_k: int = 1, chances: Tensor | None = None
) -> Judged:
    """The confidence and the correctness of each row.

    Args:
        rows: with targets.
        from_logits: whether ``rows.scores`` are logits.
        view: ``"positive"``, ``"top_label"`` or ``"top_k"``.
        top_k: the k of ``"top_k"``.
        chances: the probabilities of all classes, if they are known already.
    """
    scores, targets = rows.scores, rows.targets
    assert targets is not None
    if scores.ndim == 1:
        return _judge_binary(probabilities(scores, from_logits), targets, view)
    if view == "top_k":
        known = probabilities(scores, from_logits) if chances is None else chances
        return _judge_top_k(scores, known, targets, top_k)
    # Of the scores as they were given: rounding in the softmax makes no new ties.
    top = rows.top()
    if chances is None:
        confidence = probability_of(scores, top, from_logits)
    else:
        confidence = chances.gather(1, top.unsqueeze(1)).squeeze(1)
    if targets.is_floating_point():
        return Judged(confidence, high_precision(targets.gather(1, top.unsqueeze(1)).squeeze(1)))
    return Judged(confidence, top == targets)


def _judge_binary(chances: Tensor, targets: Tensor, view: View) -> Judged:
    correct = high_precision(targets) if targets.is_floating_point() else targets > 0
    if view == "positive":
        return Judged(chances, correct)
    positive = chances >= 0.5
    other = ~correct if correct.dtype == torch.bool else 1 - correct
    return Judged(torch.where(positive, chances, 1 - chances), correct.where(positive, other))


def _judge_top_k(scores: Tensor, chances: Tensor, targets: Tensor, top_k: int) -> Judged:
    k = min(top_k, scores.shape[1])
    confidence = chances.topk(k, 1).values.sum(1)
    # Among equal scores the first classes come first, whatever the device's own order is.
    if targets.is_floating_point():
        first = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return Judged(confidence, high_precision(targets.gather(1, first)).sum(1))
    own = targets.unsqueeze(1)
    score = scores.gather(1, own)
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > score) | ((scores == score) & (classes < own))
    return Judged(confidence, ahead.sum(1) < k)


class BinnedMetric(ExactMetric):
    """Base of what is read from bins of confidence.

    The state is, for each bin (of each class), an int64 count and five float64 sums: predictions
    are never kept. Metrics of this kind that count the same share one update in a
    ``MetricCollection``. A subclass supplies :meth:`reading`.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        n_bins: the number of equal-width bins.
        sweep: further numbers of bins, which :meth:`moments` then gives too. All are counted at
            once, in the cells that their edges cut the confidences into.
        view: what is judged. Of a multiclass prediction ``"top_label"`` (the largest probability,
            against whether that class is right), ``"top_k"`` (the sum of the k largest, against
            whether one of them is) or ``"classwise"`` (the probability of each class against how
            often it occurs). Of a binary one ``"positive"`` (the probability of the positive
            class, against how often it occurs) or ``"top_label"`` (that of the likelier class,
            against whether it is right). Of a multilabel one ``"classwise"``. The first is the
            default.
        top_k: the k of ``"top_k"``.
        num_classes: the number of classes or labels, for ``"classwise"``.
        average: of a classwise reading: ``"macro"`` (the mean over classes), ``"micro"`` (one set
            of bins for all classes) or ``"none"`` (one value for each class).
        threshold: predictions of a confidence below it do not count.
        ignore_index: positions with this class index (multilabel: entries) do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.
    """

    tasks: ClassVar[tuple[str, ...]] = ("binary", "multiclass", "multilabel")
    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    counts: Tensor
    confidence_sum: Tensor
    correct_sum: Tensor
    confidence_square_sum: Tensor
    correct_square_sum: Tensor
    joint_sum: Tensor

    def __init__(
        self,
        *,
        from_logits: bool,
        task: AnyTask = "multiclass",
        n_bins: int = 15,
        sweep: Sequence[int] = (),
        view: View | None = None,
        top_k: int = 1,
        num_classes: int | None = None,
        average: Average = "macro",
        threshold: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, task=task, **kwargs)
        _check_choices(self, task, view, top_k, average)
        for number in (n_bins, *sweep):
            check_number_of_bins(self, number)
        check_range(self, "threshold", threshold, 0.0, 1.0, cure="threshold=0.001")
        self.n_bins = n_bins
        self.sweep = tuple(sweep)
        self.view: View = view if view is not None else VIEWS[task][0]
        self.top_k = top_k
        self.average: Average = average
        self.threshold = threshold
        self.num_classes: int | None = None
        self.grid = Grid((n_bins, *self.sweep))
        shape: tuple[int, ...] = (self.grid.cells,)
        if self.view == "classwise":
            self.num_classes = check_classes(self, num_classes)
            shape = (self.num_classes, self.grid.cells)
        elif self.view != "top_k":
            self.block_size = WIDE_BLOCK
        self.add_count("counts", *shape)
        for name in BinMoments._fields[1:]:
            self.add_total(name, *shape)

    def reading(self, moments: BinMoments) -> Tensor:
        """One number for each index before the bins, NaN where nothing was counted."""
        raise NotImplementedError

    def update_settings(self) -> tuple[Any, ...]:
        """All but how the bins are read."""
        return (
            "bins",
            self.from_logits,
            self.task,
            self.grid.sizes,
            self.view,
            self.top_k,
            self.num_classes,
            self.threshold,
            self.ignore_index,
            self.validate_args,
        )

    def accumulate(self, rows: Rows) -> None:
        """Add rows to the bins."""
        self.add_rows(self.with_targets(rows))

    def with_targets(self, rows: Rows) -> Rows:
        """The rows, if they have targets."""
        if rows.targets is None:
            raise ArgumentError(self, "needs targets", cure="metric.update(logits, target)")
        return rows

    def moments(self, n_bins: int | None = None) -> BinMoments:
        """What has been counted: by this process, or by all within ``sync_context()``.

        Args:
            n_bins: one of ``sweep``; the metric's own number of bins by default.
        """
        return self.grid.merge(self.cells(), self.n_bins if n_bins is None else n_bins)

    def cells(self) -> BinMoments:
        """The states themselves."""
        return BinMoments(*(getattr(self, name) for name in BinMoments._fields))

    def bins(self) -> ReliabilityBins:
        """The counts, confidences and correctness of :meth:`moments`."""
        return self.moments().bins

    def value(self) -> Any:
        """The reading over everything that was counted."""
        if self.view != "classwise":
            return self.reading(self.moments())
        if self.average == "micro":
            return self.reading(self.moments().over_classes())
        values = self.reading(self.moments())
        return values if self.average == "none" else mean_over_classes(values)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """The reliability diagram, drawn from the state: no predictions are needed.

        Args:
            val: bins to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes; a classwise one shows all classes together.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.reliability import draw_reliability

        bins = self.bins() if val is None else val
        if bins.counts.ndim == 2:
            bins = ReliabilityBins(*(state.sum(0) for state in bins))
        return draw_reliability(bins, norm=getattr(self, "norm", "l1"), ax=ax)

    def add_rows(self, rows: Rows, chances: Tensor | None = None) -> Judged | None:
        """Add rows to the bins; returns how they were judged, unless by class.

        Args:
            rows: with targets.
            chances: the probabilities of all classes, if they are known already.
        """
        if self.view == "classwise":
            self._add_by_class(rows, chances)
            return None
        judged = counted = judge(rows, self.from_logits, self.view, self.top_k, chances)
        if self.threshold > 0:
            kept = judged.confidence >= self.threshold
            counted = Judged(*(values[kept] for values in judged))
        add_predictions(self.cells(), self.grid.place(counted.confidence), *counted)
        return judged

    def _add_by_class(self, rows: Rows, chances: Tensor | None) -> None:
        scores, targets = rows.scores, rows.targets
        assert targets is not None
        check_width(self, scores, self.num_classes)
        if self.task == "multilabel" and self.from_logits:
            chances = high_precision(scores).sigmoid()
        elif chances is None:
            chances = probabilities(scores, self.from_logits)
        add_class_predictions(self.cells(), self.grid, chances, targets, self.threshold)


def mean_over_classes(values: Tensor) -> Tensor:
    """The mean over classes of which something was counted."""
    return values.nanmean(0)


def classes_of(preds: Tensor) -> int | None:
    """The number of classes of predictions that have them on dimension 1."""
    return preds.shape[1] if preds.ndim > 1 else None


def check_number_of_bins(owner: object, n_bins: object) -> None:
    """Refuse what is no number of bins."""
    if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
        raise ArgumentError(
            owner, f"`n_bins` must be a whole number from 1, got {n_bins!r}", cure="n_bins=15"
        )


def _check_choices(
    owner: object, task: AnyTask, view: str | None, top_k: object, average: str
) -> None:
    if view is not None and view not in VIEWS[task]:
        raise ArgumentError(
            owner,
            f"`view` of a {task} task must be one of {', '.join(VIEWS[task])}, got {view!r}",
            cure=f'view="{VIEWS[task][0]}"',
        )
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ArgumentError(
            owner, f"`top_k` must be a whole number from 1, got {top_k!r}", cure="top_k=5"
        )
    if average not in AVERAGES:
        raise ArgumentError(
            owner,
            f"`average` must be one of {', '.join(AVERAGES)}, got {average!r}",
            cure='average="macro"',
        )


def check_classes(owner: object, num_classes: object) -> int:
    """Refuse what is no number of classes."""
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise ArgumentError(
            owner,
            f"`num_classes` must say how many classes there are, got {num_classes!r}",
            cure="num_classes=10",
        )
    return num_classes


def check_width(owner: object, scores: Tensor, num_classes: int | None) -> None:
    """Refuse predictions over another number of classes."""
    if scores.shape[1:] != (num_classes,):
        found = scores.shape[1] if scores.ndim == 2 else "binary ones"
        raise ArgumentError(
            owner,
            f"was made for predictions over {num_classes} classes and got {found}",
            cure=f"num_classes={found}" if scores.ndim == 2 else "num_classes=None",
        )
