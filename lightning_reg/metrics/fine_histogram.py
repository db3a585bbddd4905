"""Predictions in order of confidence: exactly, or in a histogram of known error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.binned import View, judge
from lightning_reg.metrics.inputs import Rows, Task, high_precision
from lightning_reg.metrics.kept import KeepingMetric

RESOLUTION = 2**15


class Cells(NamedTuple):
    """Predictions grouped by confidence, ascending; a group's members count as tied.

    Read from samples, a cell holds the predictions of one confidence, and what is computed from
    cells is exact. Read from a histogram, it holds those of a small range of confidences, and
    what is computed is off by what their order within the range can change.

    Attributes:
        counts: (n,) int64, the predictions in each cell; none is empty.
        confidence_sum: (n,) the sum of their confidences.
        correct_sum: (n,) the sum of their correctness.
        joint_sum: (n,) the sum of the products of the two.
        lower: (n,) no confidence in the cell is less.
        upper: (n,) no confidence in the cell is more.
    """

    counts: Tensor
    confidence_sum: Tensor
    correct_sum: Tensor
    joint_sum: Tensor
    lower: Tensor
    upper: Tensor

    @property
    def sizes(self) -> Tensor:
        """The counts as floats."""
        return self.counts.to(self.confidence_sum)

    @property
    def total(self) -> Tensor:
        """The number of predictions, as a float scalar."""
        return self.counts.sum().to(self.confidence_sum)

    @property
    def confidence(self) -> Tensor:
        """The mean confidence of each cell."""
        return self.confidence_sum / self.sizes

    @property
    def residual_sum(self) -> Tensor:
        """The sum of correctness minus confidence in each cell."""
        return self.correct_sum - self.confidence_sum

    def by_correctness(self) -> tuple[Tensor, Tensor]:
        """The mean confidences of a cell's right and of its wrong part, (n,) each.

        Where a part is empty, the mean confidence of the cell.
        """
        right, wrong = self.correct_sum, self.sizes - self.correct_sum
        mean = self.confidence
        of_right = torch.where(right > 0, self.joint_sum / right, mean)
        of_wrong = torch.where(wrong > 0, (self.confidence_sum - self.joint_sum) / wrong, mean)
        low, high = self.lower, self.upper
        return of_right.clamp(low, high), of_wrong.clamp(low, high)

    def spread(self) -> Tensor:
        """(n,) no variance of the confidences in a cell, or in a part of it, is larger."""
        return (self.upper - self.lower).square() / 4


def cells_of_samples(confidence: Tensor, correct: Tensor) -> Cells:
    """One cell for each confidence that occurs.

    Args:
        confidence: (N,) in [0, 1].
        correct: (N,) in [0, 1].
    """
    values, index, counts = torch.unique(confidence, return_inverse=True, return_counts=True)
    correct_sum = torch.zeros_like(values).index_add(0, index, correct)
    return Cells(counts, values * counts, correct_sum, values * correct_sum, values, values)


def fine_edges(resolution: int) -> Tensor:
    """(resolution + 1,) the edges of the fine cells: ``sin^2(pi j / (2 resolution))``.

    Equal steps of the angle ``arcsin sqrt(p)``, in which a frequency has the same variance
    everywhere: cells are at most ``pi / (2 resolution)`` wide at 1/2 and much narrower near 0
    and 1, where confidences crowd.
    """
    half = resolution // 2
    angle = torch.arange(half + 1, dtype=torch.float64) * (math.pi / (2 * resolution))
    low = angle.sin().square()
    return torch.cat([low, 1 - low[: resolution - half].flip(0)])


def cell_of(confidence: Tensor, boundaries: Tensor) -> Tensor:
    """The number of boundaries up to each confidence, as ``torch.bucketize`` on the right.

    Args:
        confidence: (N,) in [0, 1].
        boundaries: the :func:`fine_edges`, the first one above 0.
    """
    if confidence.dtype != torch.float64:
        return torch.bucketize(confidence, boundaries, right=True)
    # The edges are known as a formula: several times as fast as a search. Rounding of the angle
    # moves it by far less than a cell, which the comparisons with the two next edges undo.
    last = len(boundaries) - 1
    guess = (confidence.sqrt().asin() * (2 * last / math.pi)).long()
    index = guess + 1 - (confidence < boundaries[guess]).long()
    above = confidence >= boundaries[index.clamp_max(last)]
    return index + (above & (index <= last)).long()


class OrderMetric(KeepingMetric):
    """Base of metrics that depend on the order of confidences.

    A subclass supplies :meth:`statistic` and :meth:`bound`, and says by ``view`` how a binary
    score is judged: ``"positive"``, the probability of the positive class against how often it
    occurs, or ``"top_label"``, that of the predicted class against how often that is right.

    The state is a histogram of fixed size that adds up over batches and ranks: ``resolution``
    cells and two that hold the confidences of exactly 0 and 1. All metrics of this kind have the
    same state, so a ``MetricCollection`` of them fills it once.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` (top label) or ``"binary"``.
        exact: keep every confidence and correctness instead (16 bytes a prediction, gathered from
            all ranks by ``compute``): the result is exact, the state grows.
        resolution: the number of cells; 4 numbers each.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.
    """

    papers: ClassVar[tuple[Paper, ...]] = ()
    view: ClassVar[View] = "positive"
    higher_is_better = False
    plot_lower_bound = 0.0
    counts: Tensor
    confidence_sum: Tensor
    correct_sum: Tensor
    joint_sum: Tensor
    confidences: list[Tensor] | Tensor
    corrects: list[Tensor] | Tensor

    def __init__(
        self,
        *,
        from_logits: bool,
        task: Task = "multiclass",
        exact: bool = False,
        resolution: int = RESOLUTION,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            from_logits=from_logits,
            task=task,
            ignore_index=ignore_index,
            validate_args=validate_args,
            **kwargs,
        )
        if not isinstance(resolution, int) or isinstance(resolution, bool) or resolution < 2:
            raise ArgumentError(
                self,
                f"`resolution` must be a whole number from 2, got {resolution!r}",
                cure=f"resolution={RESOLUTION}",
            )
        self.exact = exact
        self.resolution = resolution
        self._edges: Tensor | None = None
        if exact:
            self.add_kept("confidences")
            self.add_kept("corrects")
            return
        self.add_count("counts", resolution + 2)
        for name in ("confidence_sum", "correct_sum", "joint_sum"):
            self.add_total(name, resolution + 2)

    def labels_only(self) -> str | None:
        """Why soft targets have no meaning for this metric, if so."""
        return None

    def statistic(self, cells: Cells) -> Tensor:
        """The metric of predictions that are grouped by confidence."""
        raise NotImplementedError

    def bound(self, cells: Cells) -> Tensor:
        """How far :meth:`statistic` can be off for the order within the cells."""
        raise NotImplementedError

    def accumulate(self, rows: Rows) -> None:
        """Add the batch to the histogram, or keep it."""
        if rows.targets is None:
            raise ArgumentError(self, "needs targets", cure="metric.update(logits, target)")
        judged = judge(rows, self.from_logits, self.view if self.task == "binary" else "top_label")
        # Probabilities may be off by rounding.
        confidence = judged.confidence.clamp(0, 1)
        correct = high_precision(judged.correct)
        if self.labels_only():
            self._refuse_soft(correct)
        if self.exact:
            self.keep("confidences", confidence)
            self.keep("corrects", correct)
            return
        index = cell_of(confidence, self._boundaries(confidence))
        self.counts.index_add_(0, index, torch.ones_like(index))
        for state, values in (
            (self.confidence_sum, confidence),
            (self.correct_sum, correct),
            (self.joint_sum, confidence * correct),
        ):
            state.index_add_(0, index, values.to(state.dtype))

    def cells(self) -> Cells:
        """What has been counted: by this process, or by all within ``sync_context()``."""
        if self.exact:
            return cells_of_samples(self.kept("confidences"), self.kept("corrects"))
        edges = fine_edges(self.resolution).to(self.confidence_sum)
        ends = edges.new_tensor([0.0]), edges.new_tensor([1.0])
        filled = self.counts > 0
        return Cells(
            self.counts[filled],
            self.confidence_sum[filled],
            self.correct_sum[filled],
            self.joint_sum[filled],
            torch.cat([ends[0], edges[:-1], ends[1]])[filled],
            torch.cat([ends[0], edges[1:], ends[1]])[filled],
        )

    def value(self) -> Tensor:
        """The metric over everything that was counted; NaN before anything was."""
        return self._read(self.statistic)

    def error_bound(self) -> Tensor:
        """No value of ``exact=True`` over the same predictions is farther away than this.

        Computed from the counts, so that it holds for these predictions whatever their
        distribution is. 0 with ``exact=True``. Of this process, or of all within
        ``sync_context()``.
        """
        if self.exact:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return self._read(self.bound)

    def update_settings(self) -> tuple[Any, ...]:
        """What decides how a batch is counted; all metrics of order share it."""
        view = self.view if self.task == "binary" else "top_label"
        names = ("from_logits", "task", "exact", "resolution", "ignore_index", "validate_args")
        own = [getattr(self, name) for name in names]
        return ("OrderMetric", view, self.labels_only() is not None, *own)

    def _refuse_soft(self, correct: Tensor) -> None:
        if bool(((correct > 0) & (correct < 1)).any()):
            raise ArgumentError(
                self,
                f"needs class indices: {self.labels_only()}",
                cure="metric.update(logits, target.argmax(1))",
            )

    def _read(self, read: Callable[[Cells], Tensor]) -> Tensor:
        cells = self.cells()
        if not len(cells.counts):
            return cells.confidence_sum.new_full((), float("nan"))
        return read(cells)

    def _boundaries(self, like: Tensor) -> Tensor:
        if self._edges is None or self._edges.device != like.device:
            edges = fine_edges(self.resolution)
            # Below the least normal number counts as 0: whether smaller ones are flushed is up
            # to the device.
            edges[0] = torch.finfo(like.dtype).tiny
            self._edges = edges.to(like)
        return self._edges
