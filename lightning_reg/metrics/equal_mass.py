"""The calibration error over bins that hold the same number of predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.fine_histogram import Cells, OrderMetric
from lightning_reg.metrics.inputs import Task
from lightning_reg.metrics.mass_bins import (
    MassBins,
    bound_of_mass_bins,
    error_of_mass_bins,
    split_by_mass,
    sweep,
)
from lightning_reg.metrics.readings import NORMS, Norm

__all__ = [
    "EqualMassCalibrationError",
    "SweepCalibrationError",
    "equal_mass_calibration_error",
    "sweep_calibration_error",
]

_ROELOFS = Paper(
    "Mitigating Bias in Calibration Error Estimation", "Roelofs et al.", 2020, "2012.08668"
)
_KUMAR = Paper("Verified Uncertainty Calibration", "Kumar et al.", 2019, "1909.10155")


def equal_mass_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    n_bins: int = 15,
    norm: Norm = "l1",
    debiased: bool = False,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The calibration error over bins of equal mass.

    The N predictions sorted by confidence, number i from 0 belongs to bin ``floor(i n_bins / N)``.
    With ``n_b`` predictions, mean confidence ``conf_b`` and mean correctness ``acc_b`` in bin b:
    ``"l1"`` is ``sum_b n_b/N |acc_b - conf_b|``, ``"l2"`` is
    ``sqrt(sum_b n_b/N (acc_b - conf_b)^2)``, ``"max"`` the largest ``|acc_b - conf_b|``. With
    ``debiased`` (l2), each square is lessened by ``acc_b (1 - acc_b) / (n_b - 1)``, an unbiased
    estimate of what the sampling of labels adds to it; a bin of one prediction, which has none,
    counts as 0, and so does a negative sum.

    Where predictions of equal confidence fall into two bins, each bin gets its share of their
    correctness: the order of the samples changes nothing.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, judged by the top class; (N, ...) of the positive
            class for ``"binary"``.
        target: class indices (N, ...), or soft targets of the shape of ``preds``.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        n_bins: the number of bins.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        debiased: subtract the variance of the labels; needs ``norm="l2"``.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> preds, target = torch.tensor([0.25, 0.5, 0.75, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> equal_mass_calibration_error(
        ...     preds, target, from_logits=False, task="binary", n_bins=2
        ... )
        tensor(0.2500, dtype=torch.float64)
    """
    metric = EqualMassCalibrationError(
        from_logits=from_logits,
        task=task,
        n_bins=n_bins,
        norm=norm,
        debiased=debiased,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def sweep_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    norm: Norm = "l2",
    max_bins: int = 4096,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """The calibration error over as many bins of equal mass as stay monotonic.

    See :class:`SweepCalibrationError`; arguments, result and errors as in
    :func:`equal_mass_calibration_error`.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([0.25, 0.5, 0.75, 1.0])
        >>> sweep_calibration_error(
        ...     probabilities, torch.tensor([0, 1, 0, 1]), from_logits=False, task="binary"
        ... )
        tensor(0.2795, dtype=torch.float64)
    """
    metric = SweepCalibrationError(
        from_logits=from_logits,
        task=task,
        norm=norm,
        max_bins=max_bins,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class EqualMassCalibrationError(OrderMetric):
    """The calibration error over bins of equal mass, exact over batches and ranks.

    Roelofs et al. (2020), Mitigating Bias in Calibration Error Estimation, arXiv:2012.08668; the
    debiased square is that of Kumar et al. (2019), Verified Uncertainty Calibration,
    arXiv:1909.10155. See :func:`equal_mass_calibration_error` for the formula. As the first
    paper's ``caltrain`` (there ``norm=2``) where confidences are distinct; tied ones count there in
    the order in which sorting leaves them.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` (top label) or ``"binary"`` (positive class).
        n_bins: the number of bins; 15 as for bins of equal width.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        debiased: subtract the variance of the labels; needs ``norm="l2"`` and class indices.
        exact: keep every confidence instead of a histogram; see
            :class:`~lightning_reg.metrics.fine_histogram.OrderMetric`.
        resolution: the number of cells of the histogram.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        From the histogram only the cells that an edge of a bin cuts are uncertain: k of their m
        predictions, E of them right, belong below the edge, of which ``max(0, k - m + E)`` to
        ``min(k, E)`` can be right. ``error_bound()`` is the norm of what that changes.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import EqualMassCalibrationError
        >>> metric = EqualMassCalibrationError(from_logits=False, task="binary", n_bins=2)
        >>> metric.update(torch.tensor([0.25, 0.5, 0.75, 1.0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    function = staticmethod(equal_mass_calibration_error)
    papers = (_ROELOFS, _KUMAR)
    plot_upper_bound = 1.0

    def __init__(
        self,
        *,
        from_logits: bool,
        n_bins: int = 15,
        norm: Norm = "l1",
        debiased: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        _check(self, n_bins, norm, debiased)
        self.n_bins = n_bins
        self.norm: Norm = norm
        self.debiased = debiased

    def labels_only(self) -> str | None:
        """Soft targets carry no variance of labels that could be subtracted."""
        return "soft targets carry no variance of labels to subtract" if self.debiased else None

    def bins(self) -> MassBins:
        """The bins of what has been counted; of all ranks only within ``sync_context()``."""
        return split_by_mass(self.cells(), self.n_bins)

    def statistic(self, cells: Cells) -> Tensor:
        """The error over bins of equal mass."""
        return error_of_mass_bins(split_by_mass(cells, self.n_bins), self.norm, self.debiased)

    def bound(self, cells: Cells) -> Tensor:
        """What the order within the cells that are cut can change."""
        return bound_of_mass_bins(split_by_mass(cells, self.n_bins), self.norm, self.debiased)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Accuracy against confidence of each bin, drawn from the state.

        Args:
            val: bins to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.order_figures import draw_mass_bins

        bins = self.bins() if val is None else val
        return draw_mass_bins(bins.confidence, bins.accuracy, ax=ax)


class SweepCalibrationError(OrderMetric):
    """The calibration error over as many bins of equal mass as keep accuracy rising (ECE sweep).

    Roelofs et al. (2020), Mitigating Bias in Calibration Error Estimation, arXiv:2012.08668. From
    two bins on, one more at a time, until the accuracy of some bin is below that of the one
    before; the error is that over the last number of bins for which it was not (one bin if two
    already fall). More bins mean less bias until noise breaks the order.

    As the paper's ``caltrain`` (``em_ece_sweep``, also its norm 2 by default) where confidences are
    distinct. It goes on to N - 1 bins; here at most to ``max_bins``, ours.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` (top label) or ``"binary"`` (positive class).
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        max_bins: where the sweep ends at the latest.
        kwargs: those of :class:`EqualMassCalibrationError`.

    Note:
        The number of bins can depend on a single prediction. From the histogram,
        ``error_bound()`` is that of :class:`EqualMassCalibrationError` if no order within the cells
        leads to another number, and infinite otherwise: then only ``exact=True`` is certain.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import SweepCalibrationError
        >>> metric = SweepCalibrationError(from_logits=False, task="binary")
        >>> metric.update(torch.tensor([0.25, 0.5, 0.75, 1.0]), torch.tensor([0, 1, 0, 1]))
        >>> metric.compute()
        tensor(0.2795, dtype=torch.float64)
    """

    function = staticmethod(sweep_calibration_error)
    papers = (_ROELOFS,)
    plot_upper_bound = 1.0

    def __init__(
        self, *, from_logits: bool, norm: Norm = "l2", max_bins: int = 4096, **kwargs: Any
    ) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        _check(self, max_bins, norm, False, "max_bins")
        self.norm: Norm = norm
        self.max_bins = max_bins

    def statistic(self, cells: Cells) -> Tensor:
        """The error over the bins where the sweep ends."""
        n_bins, _ = sweep(cells, self.max_bins)
        return error_of_mass_bins(split_by_mass(cells, n_bins), self.norm)

    def bound(self, cells: Cells) -> Tensor:
        """That of the bins, where their number is certain."""
        n_bins, certain = sweep(cells, self.max_bins)
        if not certain:
            return torch.full_like(cells.confidence_sum[0], float("inf"))
        return bound_of_mass_bins(split_by_mass(cells, n_bins), self.norm)


def _check(owner: object, n_bins: int, norm: Norm, debiased: bool, name: str = "n_bins") -> None:
    if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
        raise ArgumentError(
            owner, f"`{name}` must be a whole number from 1, got {n_bins!r}", cure=f"{name}=15"
        )
    if norm not in NORMS:
        raise ArgumentError(
            owner, f"`norm` must be one of {', '.join(NORMS)}, got {norm!r}", cure='norm="l1"'
        )
    if debiased and norm != "l2":
        raise ArgumentError(
            owner, f"`debiased` estimates a square, not the norm {norm!r}", cure='norm="l2"'
        )
