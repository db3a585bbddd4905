"""Equal-width bins of confidence, and the sums that are kept of each."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class ReliabilityBins(NamedTuple):
    """Equal-width bins of confidence over [0, 1]; the last one includes 1.

    Attributes:
        counts: (n_bins,) int64, the predictions in each bin.
        confidence_sum: (n_bins,) the sum of their confidences.
        correct_sum: (n_bins,) the sum of their correctness.

    All may have dimensions before that of the bins: one for the classes, for example.
    """

    counts: Tensor
    confidence_sum: Tensor
    correct_sum: Tensor

    @property
    def confidence(self) -> Tensor:
        """The mean confidence in each bin; NaN in an empty one."""
        return self.confidence_sum / self.counts

    @property
    def accuracy(self) -> Tensor:
        """The share of right answers in each bin; NaN in an empty one."""
        return self.correct_sum / self.counts

    def __add__(self, other: object) -> ReliabilityBins:
        """The bins of both samples."""
        if not isinstance(other, ReliabilityBins):
            return NotImplemented
        return ReliabilityBins(*(a + b for a, b in zip(self, other, strict=True)))


class BinMoments(NamedTuple):
    """What is kept of the predictions in each bin: their number, and sums up to second order.

    Attributes:
        counts: (..., n_bins) int64.
        confidence_sum: (..., n_bins) of the confidences c.
        correct_sum: (..., n_bins) of the correctness y.
        confidence_square_sum: (..., n_bins) of ``c^2``.
        correct_square_sum: (..., n_bins) of ``y^2``, which is ``y`` without soft targets.
        joint_sum: (..., n_bins) of ``c y``.
    """

    counts: Tensor
    confidence_sum: Tensor
    correct_sum: Tensor
    confidence_square_sum: Tensor
    correct_square_sum: Tensor
    joint_sum: Tensor

    @property
    def bins(self) -> ReliabilityBins:
        """Without the sums of second order."""
        return ReliabilityBins(*self[:3])

    @property
    def total(self) -> BinMoments:
        """The sums over all bins."""
        return BinMoments(*(state.sum(-1) for state in self))

    def over_classes(self) -> BinMoments:
        """The bins of all classes' predictions together, from (classes, n_bins)."""
        return BinMoments(*(state.sum(0) for state in self))


class Grid:
    """Places confidences in equal-width bins: ``[b / n, (b + 1) / n)``, and the last is closed.

    For several numbers of bins at once the cells are those that all their edges cut [0, 1] into,
    so that each confidence is placed once, and :meth:`merge` gives the bins of each number
    exactly.

    Args:
        sizes: one or more numbers of bins.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = tuple(sizes)
        self.left = sorted({b / n for n in self.sizes for b in range(n)})

    @property
    def cells(self) -> int:
        """The number of cells: of bins, if there is one number of them."""
        return len(self.left)

    @property
    def first_edge(self) -> float:
        """Where the first cell ends."""
        return self.left[1] if self.cells > 1 else float("inf")

    def place(self, confidence: Tensor) -> Tensor:
        """The cell of each confidence (N,)."""
        table, right = _look_up(self.sizes, confidence.device, confidence.dtype)
        # Exact, since the table's length is a power of two, and at most one edge lies between
        # its entries.
        entry = (confidence * len(table)).to(torch.int64).clamp_(0, len(table) - 1)
        cell = table[entry]
        return cell + (confidence >= right[cell])

    def merge(self, moments: BinMoments, n_bins: int) -> BinMoments:
        """The bins of one of the numbers of bins, from the cells."""
        if self.sizes == (n_bins,):
            return moments
        index = _owners(self.sizes, n_bins, moments.counts.device)
        return BinMoments(
            *(
                state.new_zeros((*state.shape[:-1], n_bins)).index_add_(-1, index, state)
                for state in moments
            )
        )


@lru_cache(maxsize=256)
def _owners(sizes: tuple[int, ...], n_bins: int, device: torch.device) -> Tensor:
    """The bin that each cell belongs to."""
    edges = [b / n_bins for b in range(n_bins)]
    owners = [bisect.bisect_right(edges, left) - 1 for left in Grid(sizes).left]
    with torch.inference_mode(False):
        return torch.tensor(owners, device=device)


@lru_cache(maxsize=64)
def _look_up(
    sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cell at each multiple of a power of two, and the right edge of each cell."""
    left = Grid(sizes).left
    right = [*left[1:], float("inf")]
    narrowest = min(b - a for a, b in zip(left, [*left[1:], 1.0], strict=True))
    length = 1
    while length * narrowest <= 1:
        length *= 2
    table = [bisect.bisect_right(left, i / length) - 1 for i in range(length)]
    # Made outside of inference mode, whose tensors could not be used elsewhere.
    with torch.inference_mode(False):
        return (
            torch.tensor(table, device=device),
            torch.tensor(right, device=device, dtype=dtype),
        )


def add_predictions(moments: BinMoments, cell: Tensor, confidence: Tensor, correct: Tensor) -> None:
    """Add predictions to their cells, in place.

    Args:
        moments: of shape (cells,), or any shape if ``cell`` counts through it.
        cell: (N,) where each prediction belongs.
        confidence: (N,) in high precision.
        correct: (N,) bool, or floats in [0, 1].
    """
    flat = BinMoments(*(state.view(-1) for state in moments))
    flat.counts.index_add_(0, cell, torch.ones_like(cell))
    if correct.dtype == torch.bool:
        # Right and wrong ones apart: three sums instead of five.
        apart = 2 * cell + correct
        sums = flat.confidence_sum.new_zeros(2 * len(flat.counts))
        confidences = sums.index_add(0, apart, confidence.to(sums)).view(-1, 2)
        hits = torch.zeros_like(flat.counts).index_add_(0, cell, correct.to(torch.int64))
        flat.confidence_sum.add_(confidences.sum(1))
        flat.joint_sum.add_(confidences[:, 1])
        flat.correct_sum.add_(hits)
        flat.correct_square_sum.add_(hits)
    else:
        correct = correct.to(flat.correct_sum)
        flat.confidence_sum.index_add_(0, cell, confidence.to(correct))
        flat.correct_sum.index_add_(0, cell, correct)
        flat.correct_square_sum.index_add_(0, cell, correct.square())
        flat.joint_sum.index_add_(0, cell, (confidence * correct).to(correct))
    flat.confidence_square_sum.index_add_(0, cell, confidence.square().to(flat.correct_sum))


def add_class_predictions(
    moments: BinMoments, grid: Grid, chances: Tensor, targets: Tensor, threshold: float = 0.0
) -> None:
    """Add each class's predictions to its cells, in place.

    Most probabilities of a row lie in the first cell, as they sum to one: that cell is summed
    column by column, and only the others are placed one by one.

    Args:
        moments: of shape (C, cells).
        grid: places probabilities.
        chances: (N, C) probabilities in high precision.
        targets: (N,) class indices, or (N, C) zeros and ones (-1 is left out), or soft ones.
        threshold: probabilities below it are left out.
    """
    counted = None if threshold <= 0 else chances >= threshold
    if targets.ndim == 2 and not targets.is_floating_point():
        kept = targets >= 0
        counted = kept if counted is None else counted & kept
    upper = chances >= grid.first_edge
    rest = ~upper if counted is None else counted & ~upper
    if counted is not None:
        upper &= counted
    _add_first_cell(moments, chances, targets, rest)
    rows, classes = upper.nonzero(as_tuple=True)
    confidence = chances[rows, classes]
    if targets.ndim == 1:
        correct = targets[rows] == classes
    else:
        correct = targets[rows, classes]
        correct = correct if correct.is_floating_point() else correct > 0
    cell = classes * grid.cells + grid.place(confidence)
    add_predictions(moments, cell, confidence, correct)


def _add_first_cell(moments: BinMoments, chances: Tensor, targets: Tensor, rest: Tensor) -> None:
    first = BinMoments(*(state[:, 0] for state in moments))
    low = chances.where(rest, chances.new_zeros(()))
    first.counts.add_(rest.sum(0))
    first.confidence_sum.add_(low.sum(0))
    first.confidence_square_sum.add_(low.square().sum(0))
    if targets.ndim == 2:
        correct = targets.to(chances).where(rest, chances.new_zeros(()))
        first.correct_sum.add_(correct.sum(0))
        first.correct_square_sum.add_(correct.square().sum(0))
        first.joint_sum.add_((low * correct).sum(0))
        return
    own = targets.unsqueeze(1)
    hit = rest.gather(1, own).squeeze(1).to(first.correct_sum)
    first.correct_sum.index_add_(0, targets, hit)
    first.correct_square_sum.index_add_(0, targets, hit)
    joint = low.gather(1, own).squeeze(1).to(first.joint_sum)
    first.joint_sum.index_add_(0, targets, joint)
