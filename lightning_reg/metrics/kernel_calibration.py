"""Calibration errors over pairs of predictions, weighed by a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.fine_histogram import Cells, OrderMetric
from lightning_reg.metrics.inputs import Task

__all__ = [
    "KernelDensityCalibrationError",
    "MaximumMeanCalibrationError",
    "kernel_density_calibration_error",
    "maximum_mean_calibration_error",
]

# exp(1 / bandwidth) has to stay finite.
_LEAST_BANDWIDTH = 0.005
_BLOCK = 2**22


def maximum_mean_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    bandwidth: float = 0.4,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The maximum mean calibration error, MMCE.

    With confidences ``p_i``, correctness ``y_i`` and ``k(p, q) = exp(-|p - q| / bandwidth)``,
    ``MMCE^2 = 1/N^2 sum_ij (y_i - p_i) (y_j - p_j) k(p_i, p_j)`` over all pairs, also of a
    prediction with itself. Along sorted confidences the kernel is a product, so that the sum over
    all pairs takes O(N log N) operations and O(N) memory.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, judged by the top class; (N, ...) of the positive
            class for ``"binary"``.
        target: class indices (N, ...), or soft targets of the shape of ``preds``.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        bandwidth: the width of the kernel, from 0.005; 0.4 is the paper's.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([0.75, 0.75])
        >>> maximum_mean_calibration_error(
        ...     probabilities, torch.tensor([1, 0]), from_logits=False, task="binary"
        ... )
        tensor(0.2500, dtype=torch.float64)
    """
    metric = MaximumMeanCalibrationError(
        from_logits=from_logits,
        task=task,
        bandwidth=bandwidth,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def kernel_density_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    bandwidth: float = 0.02,
    p: float = 1.0,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The calibration error with accuracy estimated by a kernel density, ECE-KDE.

    With confidences ``p_i`` and correctness ``y_i``, ``1/N sum_i |a_i - p_i|^p``, where
    ``a_i = sum_(j != i) k(p_i; p_j) y_j / sum_(j != i) k(p_i; p_j)`` leaves the prediction itself
    out and ``k(z; q)`` is the density at z of the Beta distribution with parameters
    ``q/h + 1`` and ``(1 - q)/h + 1``, h the bandwidth. Where no other prediction has any density,
    ``a_i`` is 0. Targets are labels: what is left out of a soft one is not defined.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, judged by the top class; (N, ...) of the positive
            class for ``"binary"``.
        target: class indices (N, ...).
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        bandwidth: h; the paper picks it by leave-one-out likelihood, 0.02 is ours.
        p: the power; no root is taken of the mean.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([0.75, 0.75, 0.75])
        >>> kernel_density_calibration_error(
        ...     probabilities, torch.tensor([1, 1, 1]), from_logits=False, task="binary"
        ... )
        tensor(0.2500, dtype=torch.float64)
    """
    metric = KernelDensityCalibrationError(
        from_logits=from_logits,
        task=task,
        bandwidth=bandwidth,
        p=p,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class MaximumMeanCalibrationError(OrderMetric):
    """The maximum mean calibration error (MMCE) over all pairs, in a state of fixed size.

    Kumar, Sarawagi & Jain (2018), Trainable Calibration Measures for Neural Networks from Kernel
    Mean Embeddings. See :func:`maximum_mean_calibration_error`. As netcal 1.4.0 for a multiclass
    task; for one column of scores netcal judges the predicted label, but against the probability
    of the positive class.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` (top label) or ``"binary"`` (positive class).
        bandwidth: the width of the Laplacian kernel; 0.4 is the paper's.
        exact: keep every confidence instead of a histogram; see
            :class:`~lightning_reg.metrics.fine_histogram.OrderMetric`.
        resolution: the number of cells of the histogram.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        From the histogram the predictions of a cell stand at their mean. The kernel changes by at
        most ``d / bandwidth`` when a confidence moves by d, so MMCE^2 by at most
        ``2 A B / bandwidth`` with A the mean of ``|y - p|`` and B the mean of ``|y - p|`` times the
        width of the cell; ``error_bound()`` is what that means for the root.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import MaximumMeanCalibrationError
        >>> metric = MaximumMeanCalibrationError(from_logits=False, task="binary")
        >>> metric.update(torch.tensor([0.75, 0.75]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    function = staticmethod(maximum_mean_calibration_error)
    papers = (
        Paper(
            "Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings",
            "Kumar et al.",
            2018,
            None,
        ),
    )

    def __init__(self, *, from_logits: bool, bandwidth: float = 0.4, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        _check_laplacian(self, bandwidth)
        self.bandwidth = bandwidth

    def statistic(self, cells: Cells) -> Tensor:
        """The norm of the mean embedding of the residuals."""
        return _mean_embedding(cells, self.bandwidth)

    def bound(self, cells: Cells) -> Tensor:
        """What moving predictions to the means of their cells changes in the kernel."""
        value = self.statistic(cells)
        size = cells.correct_sum + cells.confidence_sum - 2 * cells.joint_sum
        moved = size * (cells.upper - cells.lower)
        off = 2 * size.sum() * moved.sum() / cells.total.square() / self.bandwidth
        square = value.square()
        least = (square - off).clamp_min(0).sqrt()
        return torch.maximum((square + off).sqrt() - value, value - least)


class KernelDensityCalibrationError(OrderMetric):
    """The calibration error with accuracy estimated by a Beta kernel density (ECE-KDE).

    Popordanoska, Sayer & Blaschko (2022), A Consistent and Differentiable Lp Canonical Calibration
    Error Estimator, arXiv:2210.07810. See :func:`kernel_density_calibration_error` for the formula.
    As the authors' ``ece_kde.py`` for the top label; for one column of scores they double the
    result, the sum over both classes. At confidences of exactly 0 and 1 theirs is NaN; the density
    has a limit there, which is taken here.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` (top label) or ``"binary"`` (positive class).
        bandwidth: h; 0.02 is ours.
        p: the power; no root is taken of the mean.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        Every confidence is kept (16 bytes a prediction, gathered from all ranks by ``compute``):
        a kernel estimate at each of them has no exact state of fixed size, and the Beta kernel no
        useful bound in a histogram. ``compute`` takes time quadratic in the number of distinct
        confidences, in blocks.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import KernelDensityCalibrationError
        >>> metric = KernelDensityCalibrationError(from_logits=False, task="binary")
        >>> metric.update(torch.tensor([0.75, 0.75, 0.75]), torch.tensor([1, 1, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    function = staticmethod(kernel_density_calibration_error)
    papers = (
        Paper(
            "A Consistent and Differentiable Lp Canonical Calibration Error Estimator",
            "Popordanoska et al.",
            2022,
            "2210.07810",
        ),
    )

    def __init__(
        self, *, from_logits: bool, bandwidth: float = 0.02, p: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(from_logits=from_logits, exact=True, **kwargs)
        _check_density(self, bandwidth, p)
        self.bandwidth = bandwidth
        self.p = p

    def labels_only(self) -> str | None:
        """What a soft prediction leaves out is not defined."""
        return "each prediction is left out with its label"

    def statistic(self, cells: Cells) -> Tensor:
        """The mean distance of confidence from the estimated accuracy."""
        return _density_error(cells, self.bandwidth, self.p)


def _mean_embedding(cells: Cells, bandwidth: float) -> Tensor:
    residual, place = cells.residual_sum, cells.confidence / bandwidth
    # exp(-(a - b)) of a sorted pair is a product, so the sum over all b below a is a running sum.
    below = (residual * place.exp()).cumsum(0) * (-place).exp()
    square = (residual * (2 * below - residual)).sum()
    return square.clamp_min(0).sqrt() / cells.total


def _density_error(cells: Cells, bandwidth: float, p: float) -> Tensor:
    at, sizes, right = cells.confidence, cells.sizes, cells.correct_sum
    alpha, beta = at / bandwidth, (1 - at) / bandwidth
    norm = torch.lgamma(alpha + 1) + torch.lgamma(beta + 1) - torch.lgamma(alpha + beta + 2)
    total = torch.zeros_like(cells.total)
    everyone = torch.arange(len(at), device=at.device)
    for block in everyone.split(max(1, _BLOCK // len(at))):
        here = at[block].unsqueeze(1)
        log_kernel = torch.special.xlogy(alpha, here) + torch.special.xlog1py(beta, -here) - norm
        alone = (sizes[block] == 1).unsqueeze(1)
        log_kernel.masked_fill_(alone & (block.unsqueeze(1) == everyone), float("-inf"))
        # Relative to the largest: both sums of the quotient share the factor.
        largest = log_kernel.amax(1, keepdim=True)
        kernel = (log_kernel - torch.where(largest.isfinite(), largest, 0.0)).exp()
        own = kernel.gather(1, block.unsqueeze(1)).squeeze(1)
        density, correct = kernel @ sizes - own, kernel @ right
        # Of the members of a cell, the right ones leave a right one out.
        for members, left_out in ((right, own), (sizes - right, torch.zeros_like(own))):
            accuracy = torch.where(density > 0, (correct - left_out) / density, 0.0)
            total = total + (members[block] * (accuracy - at[block]).abs() ** p).sum()
    return total / cells.total


def _check_laplacian(owner: object, bandwidth: float) -> None:
    check_range(owner, "bandwidth", bandwidth, _LEAST_BANDWIDTH, cure="bandwidth=0.4")


def _check_density(owner: object, bandwidth: float, p: float) -> None:
    check_range(owner, "bandwidth", bandwidth, 0, low_open=True, cure="bandwidth=0.02")
    check_range(owner, "p", p, 0, low_open=True, cure="p=1.0")
