"""How far a classifier's confidence is from the share of its right answers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.binned import Average, BinnedMetric, View, classes_of
from lightning_reg.metrics.binning import BinMoments, ReliabilityBins
from lightning_reg.metrics.inputs import AnyTask
from lightning_reg.metrics.readings import NORMS, Norm, debiased_square_error, error_of_bins

__all__ = ["CalibrationError", "ReliabilityBins", "calibration_error"]


def calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: AnyTask = "multiclass",
    n_bins: int = 15,
    norm: Norm = "l1",
    view: View | None = None,
    top_k: int = 1,
    average: Average = "macro",
    debiased: bool = False,
    threshold: float = 0.0,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The binned calibration error.

    With the predictions sorted into equal-width bins of confidence, ``n_b`` of ``N`` in bin b:

    - ``"l1"`` (expected, ECE): ``sum_b n_b / N |acc_b - conf_b|``
    - ``"l2"`` (root mean square): ``sqrt(sum_b n_b / N (acc_b - conf_b)^2)``
    - ``"max"``: ``max_b |acc_b - conf_b|`` over bins that are not empty

    A perfectly calibrated model has an error above 0 by chance. The debiased l2 error takes
    ``acc_b (1 - acc_b) / (n_b - 1)`` from each squared gap, in a bin of one prediction the whole
    gap, and is 0 where less than nothing is left.

    Multiclass predictions are judged by their top label: confidence is the largest probability,
    correctness is 1 if the label is that class. With soft targets correctness is the target's
    probability of the top class: the expected correctness of a label drawn from it. Binary
    predictions are judged as probabilities of the positive class, against how often it occurs.
    ``view`` says otherwise.

    Bin b is ``[b / n_bins, (b + 1) / n_bins)`` and the last one is closed, as in
    ``numpy.histogram``. Confidence 1.0 therefore shares a bin with 0.95. torchmetrics 1.9 gives
    it a bin of its own: [0.95 right, 1.0 wrong] has an error of 0.525 there, and 0.475 here and by
    definition. netcal agrees with this one.

    Args:
        preds: (N, C, ...) for ``"multiclass"`` and ``"multilabel"``, (N, ...) for ``"binary"``.
        target: class indices (N, ...), or soft targets of the shape of ``preds``; for
            ``"multilabel"`` zeros and ones, or soft ones, of the shape of ``preds``.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        n_bins: the number of bins. 15 is the default of Guo et al., On Calibration of Modern
            Neural Networks (2017).
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        view: ``"top_label"``, ``"top_k"`` or ``"classwise"`` (multiclass), ``"positive"`` or
            ``"top_label"`` (binary), ``"classwise"`` (multilabel): see
            :class:`~lightning_reg.metrics.binned.BinnedMetric`.
        top_k: the k of ``"top_k"``: the sum of the k largest probabilities, against whether the
            label is among those classes.
        average: of classwise errors: ``"macro"``, ``"micro"`` or ``"none"``.
        debiased: less what the l2 error owes to chance.
        threshold: predictions of a confidence below it do not count.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS), or (C,) of ``average="none"``; NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.95, 0.05], [1.0, 0.0]])
        >>> calibration_error(probabilities, torch.tensor([0, 1]), from_logits=False)
        tensor(0.4750, dtype=torch.float64)
    """
    metric = CalibrationError(
        from_logits=from_logits,
        task=task,
        n_bins=n_bins,
        norm=norm,
        view=view,
        top_k=top_k,
        num_classes=classes_of(preds),
        average=average,
        debiased=debiased,
        threshold=threshold,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class CalibrationError(BinnedMetric):
    """The binned calibration error, exact over batches and ranks.

    See :func:`calibration_error` for the formula. The state is counts and sums for each bin (of
    each class) that add up: predictions are never kept, and ranks are joined by their sums, never
    by averaging their errors. On MPS, which has no float64, the sums are float32.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        n_bins: the number of equal-width bins.
        norm: ``"l1"`` (ECE), ``"l2"`` or ``"max"``.
        debiased: less what the l2 error owes to chance (Kumar et al., 2019).
        kwargs: ``view``, ``top_k``, ``num_classes`` (needed by ``view="classwise"``),
            ``average``, ``threshold``, ``ignore_index`` and ``validate_args`` of
            :class:`~lightning_reg.metrics.binned.BinnedMetric`.

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

    papers = (
        Paper("On Calibration of Modern Neural Networks", "Guo et al.", 2017, "1706.04599"),
        Paper("Verified Uncertainty Calibration", "Kumar et al.", 2019, "1909.10155"),
        Paper("Measuring Calibration in Deep Learning", "Nixon et al.", 2019, "1904.01685"),
    )
    function = staticmethod(calibration_error)

    def __init__(
        self,
        *,
        from_logits: bool,
        task: AnyTask = "multiclass",
        n_bins: int = 15,
        norm: Norm = "l1",
        debiased: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, task=task, n_bins=n_bins, **kwargs)
        if norm not in NORMS:
            raise ArgumentError(
                self, f"`norm` must be one of {', '.join(NORMS)}, got {norm!r}", cure='norm="l1"'
            )
        if debiased and norm != "l2":
            raise ArgumentError(
                self, f"only the l2 error can be debiased, got norm={norm!r}", cure='norm="l2"'
            )
        self.norm: Norm = norm
        self.debiased = debiased

    def reading(self, moments: BinMoments) -> Tensor:
        """The error."""
        if self.debiased:
            return debiased_square_error(moments).clamp_min(0).sqrt()
        return error_of_bins(moments.bins, self.norm)
