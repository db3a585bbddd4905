"""The calibration error in which every bin counts the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.binned import BinnedMetric, classes_of
from lightning_reg.metrics.binning import BinMoments
from lightning_reg.metrics.readings import average_error_of_bins

__all__ = ["AverageCalibrationError", "average_calibration_error"]


def average_calibration_error(
    preds: Tensor, target: Tensor, *, from_logits: bool, **settings: Any
) -> Tensor:
    """The mean of ``|acc_b - conf_b|`` over the bins that are not empty (ACE).

    Rare confidences weigh as much as usual ones. netcal's ACE is this one. The adaptive
    calibration error, which shares the abbreviation, has bins of equal mass.

    Args:
        preds: as in :func:`~lightning_reg.metrics.calibration.calibration_error`.
        target: as there.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        settings: ``task``, ``n_bins``, ``view``, ``threshold`` and the others of
            :class:`AverageCalibrationError`.

    Returns:
        A float64 scalar (float32 on MPS), or (C,) of ``average="none"``; NaN if nothing counts.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
        >>> average_calibration_error(probabilities, torch.tensor([1, 0, 0]), from_logits=False)
        tensor(0.3500, dtype=torch.float64)
    """
    settings = {"num_classes": classes_of(preds), **settings}
    metric = AverageCalibrationError(from_logits=from_logits, **settings)
    value: Tensor = evaluate(metric, preds, target)
    return value


class AverageCalibrationError(BinnedMetric):
    """The mean gap over bins that hold something, exact over batches and ranks.

    See :func:`average_calibration_error`. With ``threshold`` (1e-3, for example) and
    ``view="classwise"`` it is a thresholded ACE: the many probabilities near 0 of a prediction
    over many classes do not count.

    Args:
        kwargs: those of :class:`~lightning_reg.metrics.binned.BinnedMetric`.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import AverageCalibrationError
        >>> metric = AverageCalibrationError(from_logits=False, task="binary")
        >>> metric.update(torch.tensor([0.2, 0.2, 0.9]), torch.tensor([0, 0, 1]))
        >>> metric.compute()
        tensor(0.1500, dtype=torch.float64)
    """

    papers = (
        Paper(
            "Relaxed Softmax: Efficient Confidence Auto-Calibration for Safe Pedestrian Detection",
            "Neumann et al.",
            2018,
        ),
        Paper("Measuring Calibration in Deep Learning", "Nixon et al.", 2019, "1904.01685"),
    )
    function = staticmethod(average_calibration_error)

    def reading(self, moments: BinMoments) -> Tensor:
        """The mean gap."""
        return average_error_of_bins(moments.bins)
