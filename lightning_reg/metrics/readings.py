"""What is read from bins: calibration errors of all kinds, and the parts of a Brier score.

All take bins on the last dimension and give one number for each index before it; NaN where
nothing was counted.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_reg.metrics.binning import BinMoments, ReliabilityBins

Norm = Literal["l1", "l2", "max"]
NORMS = ("l1", "l2", "max")


def error_of_bins(bins: ReliabilityBins, norm: Norm = "l1") -> Tensor:
    """The calibration error of binned predictions."""
    gap = _gap(bins).abs()
    if norm == "l1":
        return (_share(bins) * gap).sum(-1)
    if norm == "l2":
        return (_share(bins) * gap.square()).sum(-1).sqrt()
    return _unless_empty(bins, gap.amax(-1))


def debiased_square_error(moments: BinMoments) -> Tensor:
    """The squared l2 error less what it owes to chance; negative where chance explains it."""
    n = moments.counts.to(moments.correct_sum)
    mean = moments.correct_sum / n.clamp_min(1)
    variance = (moments.correct_square_sum - n * mean.square()) / (n - 1).clamp_min(1)
    square = _gap(moments.bins).square() - variance / n.clamp_min(1)
    return (_share(moments.bins) * square.where(n > 1, square.new_zeros(()))).sum(-1)


def average_error_of_bins(bins: ReliabilityBins) -> Tensor:
    """The mean gap over the bins that hold something, each counting once."""
    filled = (bins.counts > 0).sum(-1)
    return _gap(bins).abs().sum(-1) / filled


def one_sided_error(bins: ReliabilityBins, sign: int, weighted: bool) -> Tensor:
    """The calibration error of the bins whose confidence is too high (1) or too low (-1).

    Args:
        bins: what was counted.
        sign: which side.
        weighted: multiply each bin's gap by its confidence.
    """
    gap = (sign * _gap(bins)).clamp_min(0)
    if weighted:
        gap = gap * (bins.confidence_sum / bins.counts.clamp_min(1))
    return (_share(bins) * gap).sum(-1)


def signed_gap(bins: ReliabilityBins) -> Tensor:
    """The mean confidence less the mean correctness."""
    return (bins.confidence_sum - bins.correct_sum).sum(-1) / bins.counts.sum(-1)


class BrierParts(NamedTuple):
    """``brier = reliability - resolution + uncertainty + within_bin_variance
    - within_bin_covariance``.

    Attributes:
        brier: the mean of ``(c - y)^2``.
        reliability: the squared gap between confidence and accuracy of the bins.
        resolution: how far the bins' accuracies are from the overall one.
        uncertainty: the variance of the outcomes.
        within_bin_variance: of the confidences around their bin's mean.
        within_bin_covariance: twice that of confidences and outcomes within bins.
    """

    brier: Tensor
    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor
    within_bin_variance: Tensor
    within_bin_covariance: Tensor


def brier_parts(moments: BinMoments) -> BrierParts:
    """The decomposition of the mean of ``(c - y)^2``, which adds up to rounding."""
    share, total = _share(moments.bins), moments.total
    n = moments.counts.to(moments.correct_sum).clamp_min(1)
    all_n = total.counts.to(moments.correct_sum)
    confidence, correct = moments.confidence_sum / n, moments.correct_sum / n
    overall = total.correct_sum / all_n
    spread = (total.confidence_square_sum / all_n) - (share * confidence.square()).sum(-1)
    joint = (total.joint_sum / all_n) - (share * confidence * correct).sum(-1)
    square = total.confidence_square_sum - 2 * total.joint_sum + total.correct_square_sum
    return BrierParts(
        brier=square / all_n,
        reliability=(share * (confidence - correct).square()).sum(-1),
        resolution=(share * (correct - overall.unsqueeze(-1)).square()).sum(-1),
        uncertainty=total.correct_square_sum / all_n - overall.square(),
        within_bin_variance=spread,
        within_bin_covariance=2 * joint,
    )


def _share(bins: ReliabilityBins) -> Tensor:
    """Each bin's share of the predictions; NaN if there are none."""
    return bins.counts.to(bins.confidence_sum) / bins.counts.sum(-1, keepdim=True)


def _gap(bins: ReliabilityBins) -> Tensor:
    """Confidence less accuracy, and 0 in an empty bin."""
    return (bins.confidence_sum - bins.correct_sum) / bins.counts.clamp_min(1)


def _unless_empty(bins: ReliabilityBins, value: Tensor) -> Tensor:
    return value.where(bins.counts.sum(-1) > 0, torch.full_like(value, float("nan")))
