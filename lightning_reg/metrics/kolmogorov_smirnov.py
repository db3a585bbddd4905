"""Calibration without bins: the cumulative difference of correctness and confidence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.fine_histogram import Cells, OrderMetric
from lightning_reg.metrics.inputs import Task

__all__ = [
    "KolmogorovSmirnovCalibrationError",
    "KuiperCalibrationError",
    "kolmogorov_smirnov_calibration_error",
    "kuiper_calibration_error",
]


def kolmogorov_smirnov_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    normalized: bool = False,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The Kolmogorov-Smirnov calibration error: the largest cumulative difference.

    With the N predictions sorted by confidence ``p_i`` and ``y_i`` their correctness,
    ``KS = max_k |C_k|``, ``C_k = 1/N sum_(i <= k) (y_i - p_i)``. k runs over the ends of groups
    of equal confidence only: what lies between depends on the order of tied samples.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, judged by the top class; (N, ...) of the positive
            class for ``"binary"``.
        target: class indices (N, ...), or soft targets of the shape of ``preds``.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        normalized: divide by ``1/N sqrt(sum_i p_i (1 - p_i))``, the standard deviation of ``C_N``
            under calibration: the statistic of a test.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([0.25, 0.5, 0.75])
        >>> kolmogorov_smirnov_calibration_error(
        ...     probabilities, torch.tensor([1, 1, 1]), from_logits=False, task="binary"
        ... )
        tensor(0.5000, dtype=torch.float64)
    """
    metric = KolmogorovSmirnovCalibrationError(
        from_logits=from_logits,
        task=task,
        normalized=normalized,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def kuiper_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    normalized: bool = False,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The Kuiper calibration error: the range of the cumulative difference.

    ``max_k C_k - min_k C_k`` with ``C_0 = 0`` and the ``C_k`` of
    :func:`kolmogorov_smirnov_calibration_error`: the largest miscalibration over any range of
    confidences. Arguments, result and errors as there.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([0.25, 0.5, 0.75])
        >>> kuiper_calibration_error(
        ...     probabilities, torch.tensor([1, 0, 0]), from_logits=False, task="binary"
        ... )
        tensor(0.4167, dtype=torch.float64)
    """
    metric = KuiperCalibrationError(
        from_logits=from_logits,
        task=task,
        normalized=normalized,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def cumulative_difference(cells: Cells) -> Tensor:
    """(n + 1,) the ``C_k`` at the ends of the cells, from ``C_0 = 0``."""
    ends = cells.residual_sum.cumsum(0) / cells.total
    return torch.cat([ends.new_zeros(1), ends])


def cumulative_limits(cells: Cells) -> tuple[Tensor, Tensor]:
    """The least and the most that a ``C_k`` within the cells can be, whatever their order."""
    ends = cumulative_difference(cells)
    rise = (cells.correct_sum - cells.joint_sum).clamp_min(0) / cells.total
    fall = (cells.confidence_sum - cells.joint_sum).clamp_min(0) / cells.total
    least = torch.maximum(ends[:-1] - fall, ends[1:] - rise)
    most = torch.minimum(ends[:-1] + rise, ends[1:] + fall)
    return torch.minimum(least.min(), ends.min()), torch.maximum(most.max(), ends.max())


class _CumulativeMetric(OrderMetric):
    """Base of what is read from the cumulative difference."""

    def __init__(self, *, from_logits: bool, normalized: bool = False, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        self.normalized = normalized

    def size(self, least: Tensor, most: Tensor) -> Tensor:
        """The metric of the least and the largest cumulative difference."""
        raise NotImplementedError

    def statistic(self, cells: Cells) -> Tensor:
        """The size of the cumulative difference at the ends of the cells."""
        return _read(cells, self.size, self.normalized)

    def bound(self, cells: Cells) -> Tensor:
        """What the cumulative difference can reach within the cells."""
        value, most = self.statistic(cells), self.size(*cumulative_limits(cells))
        if not self.normalized:
            return most - value
        # Within a cell the confidences vary, which only lessens the variance.
        variance = _variance(cells) - (cells.sizes * cells.spread()).sum() / cells.total.square()
        return most / variance.clamp_min(0).sqrt() - value

    def curve(self) -> tuple[Tensor, Tensor]:
        """The share of predictions and the cumulative difference, at the ends of the cells."""
        cells = self.cells()
        share = cells.sizes.cumsum(0) / cells.total
        return torch.cat([share.new_zeros(1), share]), cumulative_difference(cells)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """The cumulative difference, drawn from the state: its slopes are the miscalibration.

        Args:
            val: a pair of tensors, shares and differences, to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.order_figures import draw_cumulative

        return draw_cumulative(*(self.curve() if val is None else val), ax=ax)


class KolmogorovSmirnovCalibrationError(_CumulativeMetric):
    """The largest cumulative difference of correctness and confidence: calibration without bins.

    Gupta et al. (2021), Calibration of Neural Networks using Splines, arXiv:2006.12800. See
    :func:`kolmogorov_smirnov_calibration_error` for the formula; as the authors'
    ``cal_metrics/KS.py`` where confidences are distinct. There tied predictions count in the order
    that sorting left them in; here they are one step.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` (top label) or ``"binary"`` (positive class).
        normalized: in standard deviations under calibration.
        exact: keep every confidence instead of a histogram; see
            :class:`~lightning_reg.metrics.fine_histogram.OrderMetric`.
        resolution: the number of cells of the histogram.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        From the histogram the differences at the ends of cells are exact; inside a cell the
        difference rises by at most ``1/N sum y (1 - p)`` and falls by at most
        ``1/N sum (1 - y) p`` over the cell. ``error_bound()`` follows: about a
        quarter of the share of the fullest cell at most.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import KolmogorovSmirnovCalibrationError
        >>> metric = KolmogorovSmirnovCalibrationError(from_logits=False, task="binary")
        >>> metric.update(torch.tensor([0.25, 0.5, 0.75]), torch.tensor([1, 1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    function = staticmethod(kolmogorov_smirnov_calibration_error)
    papers = (
        Paper("Calibration of Neural Networks using Splines", "Gupta et al.", 2021, "2006.12800"),
    )

    def size(self, least: Tensor, most: Tensor) -> Tensor:
        """The larger of the two in size."""
        return _largest(least, most)


class KuiperCalibrationError(_CumulativeMetric):
    """The range of the cumulative difference of correctness and confidence.

    Arrieta-Ibarra et al. (2022), Metrics of Calibration for Probabilistic Predictions,
    arXiv:2205.09680 (there ECCE-R; the Kolmogorov-Smirnov error is ECCE-MAD). See
    :func:`kuiper_calibration_error`; as the authors' code, which needs distinct confidences.
    Unlike the Kolmogorov-Smirnov error it is the same read from either end.

    Args:
        kwargs: those of :class:`KolmogorovSmirnovCalibrationError`.

    Note:
        ``error_bound()`` from the same limits: at most about half the share of the fullest cell.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import KuiperCalibrationError
        >>> metric = KuiperCalibrationError(from_logits=False, task="binary")
        >>> metric.update(torch.tensor([0.25, 0.5, 0.75]), torch.tensor([1, 0, 0]))
        >>> metric.compute()
        tensor(0.4167, dtype=torch.float64)
    """

    function = staticmethod(kuiper_calibration_error)
    papers = (
        Paper(
            "Metrics of Calibration for Probabilistic Predictions",
            "Arrieta-Ibarra et al.",
            2022,
            "2205.09680",
        ),
    )

    def size(self, least: Tensor, most: Tensor) -> Tensor:
        """The distance of the two."""
        return _range(least, most)


def _read(cells: Cells, size: Any, normalized: bool) -> Tensor:
    ends = cumulative_difference(cells)
    value: Tensor = size(ends.min(), ends.max())
    return value / _variance(cells).sqrt() if normalized else value


def _variance(cells: Cells) -> Tensor:
    mean = cells.confidence
    return (cells.sizes * mean * (1 - mean)).sum() / cells.total.square()


def _largest(least: Tensor, most: Tensor) -> Tensor:
    return torch.maximum(-least, most)


def _range(least: Tensor, most: Tensor) -> Tensor:
    return most - least
