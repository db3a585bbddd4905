"""Predictions in bins that hold the same number of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_reg.metrics.fine_histogram import Cells
from lightning_reg.metrics.readings import Norm


class MassBins(NamedTuple):
    """Consecutive predictions in order of confidence, as nearly as many in each bin as can be.

    Attributes:
        sizes: (n_bins,) float, the predictions in each bin; 0 where there are fewer than bins.
        confidence_sum: (n_bins,) the sum of their confidences.
        correct_sum: (n_bins,) the sum of their correctness; tied predictions on both sides of an
            edge share it in proportion.
        confidence_slack: (n_bins,) how far the confidence sum can be off.
        correct_slack: (n_bins,) how far the correctness sum can be off for the order in a cell.
    """

    sizes: Tensor
    confidence_sum: Tensor
    correct_sum: Tensor
    confidence_slack: Tensor
    correct_slack: Tensor

    @property
    def confidence(self) -> Tensor:
        """The mean confidence in each bin; NaN in an empty one."""
        return self.confidence_sum / self.sizes

    @property
    def accuracy(self) -> Tensor:
        """The share of right predictions in each bin; NaN in an empty one."""
        return self.correct_sum / self.sizes


def split_by_mass(cells: Cells, n_bins: int) -> MassBins:
    """The predictions in bins of equal mass."""
    total = cells.counts.sum()
    numbers = torch.arange(n_bins + 1, device=total.device)
    # The first i with floor(i n_bins / N) >= b, in whole numbers.
    edges = -((-numbers * total) // n_bins)
    ends = cells.counts.cumsum(0)
    cell = torch.searchsorted(ends, edges).clamp_max(len(ends) - 1)
    inside = (edges - ends[cell] + cells.counts[cell]).to(cells.confidence_sum)
    part = inside / cells.sizes[cell]
    confidence = _cumulative(cells.confidence_sum, cell, part)
    correct = _cumulative(cells.correct_sum, cell, part)
    off_confidence, off_correct = _slack(cells, cell, inside)
    return MassBins(
        edges.diff().to(confidence),
        confidence.diff(),
        correct.diff(),
        off_confidence[1:] + off_confidence[:-1],
        off_correct[1:] + off_correct[:-1],
    )


def error_of_mass_bins(bins: MassBins, norm: Norm = "l1", debiased: bool = False) -> Tensor:
    """The calibration error of binned predictions."""
    gap = _per_member(bins, bins.correct_sum - bins.confidence_sum)
    if not debiased:
        return _norm(bins, gap, norm)
    return _debiased_square(bins, gap).clamp_min(0).sqrt()


def bound_of_mass_bins(bins: MassBins, norm: Norm = "l1", debiased: bool = False) -> Tensor:
    """How far :func:`error_of_mass_bins` can be off."""
    off = _per_member(bins, bins.confidence_slack + bins.correct_slack)
    if not debiased:
        return _norm(bins, off, norm)
    gap = _per_member(bins, bins.correct_sum - bins.confidence_sum)
    of_accuracy = _per_member(bins, bins.correct_slack)
    of_squares = off * (2 * gap.abs() + off) + of_accuracy / (bins.sizes - 1).clamp_min(1)
    off_square = (bins.sizes * of_squares).sum() / bins.sizes.sum()
    square = _debiased_square(bins, gap)
    least, most = (square - off_square).clamp_min(0), (square + off_square).clamp_min(0)
    value = square.clamp_min(0).sqrt()
    return torch.maximum(most.sqrt() - value, value - least.sqrt())


def sweep(cells: Cells, max_bins: int) -> tuple[int, bool]:
    """The number of bins before accuracy first falls from one bin to the next.

    Returns:
        The number, and whether it is the same for every order within the cells.
    """
    most = min(max(int(cells.counts.sum()) - 1, 1), max_bins)
    accuracy = cells.correct_sum / cells.sizes
    if bool((accuracy.diff() >= 0).all()) and bool((cells.lower == cells.upper).all()):
        return most, True
    certain = True
    for n_bins in range(2, most + 1):
        bins = split_by_mass(cells, n_bins)
        step = bins.accuracy.diff()
        off = bins.correct_slack / bins.sizes
        off = off[1:] + off[:-1]
        if bool((step < 0).any()):
            return n_bins - 1, certain and bool((step < -off).any())
        certain = certain and bool((step >= off).all())
    return most, certain


def _cumulative(values: Tensor, cell: Tensor, part: Tensor) -> Tensor:
    """The sum of all before the edges, of which ``part`` of ``cell`` is one side."""
    return values.cumsum(0)[cell] - (1 - part) * values[cell]


def _slack(cells: Cells, cell: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    size, right = cells.sizes[cell], cells.correct_sum[cell]
    mean, outside = cells.confidence[cell], size - inside
    expected = inside * right / size
    most = torch.minimum(inside, right) - expected
    least = expected - (right - outside).clamp_min(0)
    confidence = torch.minimum(
        inside * (mean - cells.lower[cell]), outside * (cells.upper[cell] - mean)
    )
    return confidence.clamp_min(0), torch.maximum(most, least).clamp_min(0)


def _per_member(bins: MassBins, values: Tensor) -> Tensor:
    return values / bins.sizes.clamp_min(1)


def _norm(bins: MassBins, gap: Tensor, norm: Norm) -> Tensor:
    share = bins.sizes / bins.sizes.sum()
    if norm == "l1":
        return (share * gap.abs()).sum()
    if norm == "l2":
        return (share * gap.square()).sum().sqrt()
    return gap.abs().max()


def _debiased_square(bins: MassBins, gap: Tensor) -> Tensor:
    accuracy = _per_member(bins, bins.correct_sum)
    variance = accuracy * (1 - accuracy) / (bins.sizes - 1).clamp_min(1)
    # A bin of one has no variance to go by: chance explains all of its gap.
    square = torch.where(bins.sizes > 1, gap.square() - variance, 0.0)
    return (bins.sizes * square).sum() / bins.sizes.sum()
