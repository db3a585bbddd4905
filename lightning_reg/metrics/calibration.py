"""How far a classifier's confidence is from the share of its right answers."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.exact import ExactMetric
from lightning_reg.metrics.inputs import (
    Rows,
    Task,
    check_arguments,
    high_precision,
    log_probabilities,
    read_rows,
)

Norm = Literal["l1", "l2", "max"]
_NORMS = ("l1", "l2", "max")

__all__ = ["CalibrationError", "ReliabilityBins", "calibration_error"]


class ReliabilityBins(NamedTuple):
    """Equal-width bins of confidence over [0, 1]; the last one includes 1.

    Attributes:
        counts: (n_bins,) int64, the predictions in each bin.
        confidence_sum: (n_bins,) the sum of their confidences.
        correct_sum: (n_bins,) the sum of their correctness.
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


def calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    n_bins: int = 15,
    norm: Norm = "l1",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The binned calibration error.

    With the predictions sorted into equal-width bins of confidence, ``n_b`` of ``N`` in bin b:

    - ``"l1"`` (expected, ECE): ``sum_b n_b / N |acc_b - conf_b|``
    - ``"l2"`` (root mean square): ``sqrt(sum_b n_b / N (acc_b - conf_b)^2)``
    - ``"max"``: ``max_b |acc_b - conf_b|`` over bins that are not empty

    Multiclass predictions are judged by their top label: confidence is the largest probability,
    correctness is 1 if the label is that class. With soft targets correctness is the target's
    probability of the top class: the expected correctness of a label drawn from it. Binary
    predictions are judged as probabilities of the positive class, against how often it occurs.

    Bin b is ``[b / n_bins, (b + 1) / n_bins)`` and the last one is closed, as in
    ``numpy.histogram``. Confidence 1.0 therefore shares a bin with 0.95.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, (N, ...) for ``"binary"``.
        target: class indices (N, ...), or soft targets of the shape of ``preds``.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        n_bins: the number of bins. 15 is the default of Guo et al., On Calibration of Modern
            Neural Networks (2017).
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.95, 0.05], [1.0, 0.0]])
        >>> calibration_error(probabilities, torch.tensor([0, 1]), from_logits=False)
        tensor(0.4750, dtype=torch.float64)
    """
    owner = "calibration_error"
    check_arguments(owner, task, from_logits)
    _check_binning(owner, n_bins, norm)
    rows = read_rows(
        owner,
        preds,
        target,
        task=task,
        from_logits=from_logits,
        ignore_index=ignore_index,
        validate=validate_args,
    )
    return error_of_bins(sort_into_bins(owner, rows, from_logits, n_bins), norm)


def sort_into_bins(owner: object, rows: Rows, from_logits: bool, n_bins: int) -> ReliabilityBins:
    """The bins of one batch."""
    if rows.targets is None:
        raise ArgumentError(owner, "needs targets", cure="metric.update(logits, target)")
    confidence, correct = _confidence_and_correctness(rows.scores, rows.targets, from_logits)
    edges = torch.arange(1, n_bins, dtype=confidence.dtype, device=confidence.device) / n_bins
    index = torch.bucketize(confidence, edges, right=True)
    counts = torch.zeros(n_bins, dtype=torch.int64, device=confidence.device)
    sums = torch.zeros(n_bins, dtype=confidence.dtype, device=confidence.device)
    return ReliabilityBins(
        counts.index_add(0, index, torch.ones_like(index)),
        sums.index_add(0, index, confidence),
        sums.index_add(0, index, correct),
    )


def error_of_bins(bins: ReliabilityBins, norm: Norm = "l1") -> Tensor:
    """The calibration error of binned predictions; NaN if all bins are empty."""
    total = bins.counts.sum()
    filled = bins.counts > 0
    gap = (bins.accuracy - bins.confidence).abs().where(filled, bins.confidence_sum.new_zeros(()))
    share = bins.counts.to(gap) / total
    if norm == "l1":
        return (share * gap).sum()
    if norm == "l2":
        return (share * gap.square()).sum().sqrt()
    return gap.max().where(total > 0, gap.new_full((), float("nan")))


class CalibrationError(ExactMetric):
    """The binned calibration error, exact over batches and ranks.

    See :func:`calibration_error` for the formula. The state is three vectors of ``n_bins``
    numbers (int64 counts, float64 sums) that add up: predictions are never kept, and ranks are
    joined by their sums, never by averaging their errors. On MPS, which has no float64, the sums
    are float32.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` (top label) or ``"binary"`` (positive class).
        n_bins: the number of equal-width bins.
        norm: ``"l1"`` (ECE), ``"l2"`` or ``"max"``.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        Rows with NaN or infinity are left out, and ``compute`` warns with their number. NaN before
        anything was counted.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import CalibrationError
        >>> metric = CalibrationError(from_logits=False)
        >>> metric.update(torch.tensor([[0.95, 0.05], [1.0, 0.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.4750, dtype=torch.float64)
    """

    function = staticmethod(calibration_error)
    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    counts: Tensor
    confidence_sum: Tensor
    correct_sum: Tensor

    def __init__(
        self,
        *,
        from_logits: bool,
        task: Task = "multiclass",
        n_bins: int = 15,
        norm: Norm = "l1",
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
        _check_binning(self, n_bins, norm)
        self.n_bins = n_bins
        self.norm: Norm = norm
        self.add_count("counts", n_bins)
        self.add_total("confidence_sum", n_bins)
        self.add_total("correct_sum", n_bins)

    def accumulate(self, rows: Rows) -> None:
        """Add the batch's bins."""
        batch = sort_into_bins(self, rows, self.from_logits, self.n_bins)
        self.counts = self.counts + batch.counts
        self.confidence_sum = self.confidence_sum + batch.confidence_sum.to(self.confidence_sum)
        self.correct_sum = self.correct_sum + batch.correct_sum.to(self.correct_sum)

    def bins(self) -> ReliabilityBins:
        """What has been counted: by this process, or by all within ``sync_context()``."""
        return ReliabilityBins(self.counts, self.confidence_sum, self.correct_sum)

    def value(self) -> Tensor:
        """The error over everything that was counted."""
        return error_of_bins(self.bins(), self.norm)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """The reliability diagram, drawn from the state: no predictions are needed.

        Args:
            val: bins to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.reliability import draw_reliability

        return draw_reliability(self.bins() if val is None else val, norm=self.norm, ax=ax)


def _check_binning(owner: object, n_bins: int, norm: Norm) -> None:
    if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
        raise ArgumentError(
            owner, f"`n_bins` must be a whole number from 1, got {n_bins!r}", cure="n_bins=15"
        )
    if norm not in _NORMS:
        raise ArgumentError(
            owner, f"`norm` must be one of {', '.join(_NORMS)}, got {norm!r}", cure='norm="l1"'
        )


def _confidence_and_correctness(
    scores: Tensor, targets: Tensor, from_logits: bool
) -> tuple[Tensor, Tensor]:
    if scores.ndim == 1:
        confidence = high_precision(scores)
        if from_logits:
            confidence = confidence.sigmoid()
        return confidence, high_precision(targets)
    top = scores.argmax(1, keepdim=True)
    if from_logits:
        confidence = log_probabilities(scores, from_logits).gather(1, top).exp().squeeze(1)
    else:
        confidence = high_precision(scores.gather(1, top)).squeeze(1)
    if targets.is_floating_point():
        return confidence, high_precision(targets.gather(1, top).squeeze(1))
    return confidence, high_precision(top.squeeze(1) == targets)
