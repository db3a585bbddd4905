"""The two sides of the calibration error: confidence above accuracy, and below it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.binned import BinnedMetric, classes_of
from lightning_reg.metrics.binning import BinMoments
from lightning_reg.metrics.readings import one_sided_error

__all__ = [
    "OverconfidenceError",
    "UnderconfidenceError",
    "overconfidence_error",
    "underconfidence_error",
]


def overconfidence_error(
    preds: Tensor, target: Tensor, *, from_logits: bool, weighted: bool = False, **settings: Any
) -> Tensor:
    """``sum_b n_b / N max(conf_b - acc_b, 0)``: the overconfident part of the ECE.

    Thulasidasan et al. (2019) multiply each bin's gap by ``conf_b`` (``weighted=True``), since
    the surer a prediction, the dearer a mistake. Without it, over- and underconfidence add up to
    the ECE.

    Args:
        preds: as in :func:`~lightning_reg.metrics.calibration.calibration_error`.
        target: as there.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        weighted: multiply each gap by the bin's confidence.
        settings: ``task``, ``n_bins``, ``view`` and the others of :class:`OverconfidenceError`.

    Returns:
        A float64 scalar (float32 on MPS), or (C,) of ``average="none"``; NaN if nothing counts.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
        >>> overconfidence_error(probabilities, torch.tensor([1, 0]), from_logits=False)
        tensor(0.3000, dtype=torch.float64)
    """
    settings = {"num_classes": classes_of(preds), **settings}
    metric = OverconfidenceError(from_logits=from_logits, weighted=weighted, **settings)
    value: Tensor = evaluate(metric, preds, target)
    return value


def underconfidence_error(
    preds: Tensor, target: Tensor, *, from_logits: bool, weighted: bool = False, **settings: Any
) -> Tensor:
    """``sum_b n_b / N max(acc_b - conf_b, 0)``: the underconfident part of the ECE.

    Args:
        preds: as in :func:`overconfidence_error`.
        target: as there.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        weighted: multiply each gap by the bin's confidence.
        settings: ``task``, ``n_bins``, ``view`` and the others of :class:`UnderconfidenceError`.

    Returns:
        A float64 scalar (float32 on MPS), or (C,) of ``average="none"``; NaN if nothing counts.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
        >>> underconfidence_error(probabilities, torch.tensor([1, 0]), from_logits=False)
        tensor(0.0500, dtype=torch.float64)
    """
    settings = {"num_classes": classes_of(preds), **settings}
    metric = UnderconfidenceError(from_logits=from_logits, weighted=weighted, **settings)
    value: Tensor = evaluate(metric, preds, target)
    return value


class _OneSidedError(BinnedMetric):
    sign: ClassVar[int]

    def __init__(self, *, from_logits: bool, weighted: bool = False, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        self.weighted = weighted

    def reading(self, moments: BinMoments) -> Tensor:
        """The error of one side."""
        return one_sided_error(moments.bins, self.sign, self.weighted)


class OverconfidenceError(_OneSidedError):
    """The overconfident part of the calibration error, exact over batches and ranks.

    See :func:`overconfidence_error`.

    Args:
        weighted: multiply each bin's gap by its confidence, as Thulasidasan et al. do.
        kwargs: those of :class:`~lightning_reg.metrics.binned.BinnedMetric`.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import OverconfidenceError
        >>> metric = OverconfidenceError(from_logits=False)
        >>> metric.update(torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.3000, dtype=torch.float64)
    """

    papers = (
        Paper(
            "On Mixup Training: Improved Calibration and Predictive Uncertainty for Deep Neural "
            "Networks",
            "Thulasidasan et al.",
            2019,
            "1905.11001",
        ),
    )
    function = staticmethod(overconfidence_error)
    sign = 1


class UnderconfidenceError(_OneSidedError):
    """The underconfident part of the calibration error, exact over batches and ranks.

    See :func:`underconfidence_error`.

    Args:
        weighted: multiply each bin's gap by its confidence.
        kwargs: those of :class:`~lightning_reg.metrics.binned.BinnedMetric`.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import UnderconfidenceError
        >>> metric = UnderconfidenceError(from_logits=False)
        >>> metric.update(torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.0500, dtype=torch.float64)
    """

    function = staticmethod(underconfidence_error)
    sign = -1
