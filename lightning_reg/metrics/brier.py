"""The Brier score, and what it is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.binned import BinnedMetric, classes_of, mean_over_classes
from lightning_reg.metrics.exact import MeanMetric
from lightning_reg.metrics.inputs import Task, high_precision, probabilities
from lightning_reg.metrics.readings import BrierParts, brier_parts

__all__ = ["BrierDecomposition", "BrierScore", "brier_decomposition", "brier_score"]


def brier_score(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """The mean of ``sum_c (p_c - y_c)^2``, from 0 to 2; of ``(p - y)^2`` for a binary task.

    A binary task that is given as two classes has twice the score: Brier's own definition sums
    over classes. scikit-learn halves the sum unless ``scale_by_half=False``; torch-uncertainty
    sums as here.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, (N, ...) for ``"binary"``.
        target: class indices (N, ...), or soft targets of the shape of ``preds``.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> brier_score(torch.tensor([[0.6, 0.4]]), torch.tensor([0]), from_logits=False)
        tensor(0.3200, dtype=torch.float64)
    """
    metric = BrierScore(
        from_logits=from_logits, task=task, ignore_index=ignore_index, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def brier_of_rows(chances: Tensor, targets: Tensor) -> Tensor:
    """The squared distance (N,) of probabilities (N, C), or (N,), to their targets."""
    if chances.ndim == 1:
        return (chances - targets).square()
    if targets.is_floating_point():
        return (chances - high_precision(targets)).square().sum(1)
    own = chances.gather(1, targets.unsqueeze(1)).squeeze(1)
    length: Tensor = torch.linalg.vecdot(chances, chances)
    return length - 2 * own + 1


def brier_decomposition(
    preds: Tensor, target: Tensor, *, from_logits: bool, **settings: Any
) -> dict[str, Tensor]:
    r"""The mean squared error of confidences, and the parts that it adds up from.

    With confidences c and outcomes y in bins k, means :math:`\bar c_k, \bar y_k, \bar y`::

        brier = reliability - resolution + uncertainty + within_bin_variance - within_bin_covariance
        reliability  = sum_k n_k / N (mean c_k - mean y_k)^2
        resolution   = sum_k n_k / N (mean y_k - mean y)^2
        uncertainty  = the variance of y

    Murphy's three parts alone add up only where all confidences of a bin are equal; the variance
    within bins and twice the covariance close the gap (Stephenson et al., 2008).

    Args:
        preds: as in :func:`~lightning_reg.metrics.calibration.calibration_error`.
        target: as there.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        settings: those of :class:`BrierDecomposition`.

    Returns:
        The score and its parts by name, float64 (float32 on MPS); NaN if nothing counts.

    Example:
        >>> import torch
        >>> chances, target = torch.tensor([0.2, 0.2, 0.8]), torch.tensor([0, 1, 1])
        >>> parts = brier_decomposition(chances, target, from_logits=False, task="binary")
        >>> {name: round(float(value), 4) for name, value in parts.items()}["reliability"]
        0.0733
    """
    settings = {"num_classes": classes_of(preds), **settings}
    metric = BrierDecomposition(from_logits=from_logits, **settings)
    value: dict[str, Tensor] = evaluate(metric, preds, target)
    return value


class BrierScore(MeanMetric):
    """The mean squared distance of probabilities to their targets, exact over batches and ranks.

    See :func:`brier_score`. The state is a float64 sum (float32 on MPS) and an int64 count.

    Args:
        kwargs: those of :class:`~lightning_reg.metrics.exact.ExactMetric`.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import BrierScore
        >>> metric = BrierScore(from_logits=False)
        >>> metric.update(torch.tensor([[0.6, 0.4]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.3200, dtype=torch.float64)
    """

    papers = (Paper("Verification of Forecasts Expressed in Terms of Probability", "Brier", 1950),)
    function = staticmethod(brier_score)
    higher_is_better = False
    plot_lower_bound = 0.0

    def values(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """The squared distance of each row."""
        if targets is None:
            raise ArgumentError(self, "needs targets", cure="metric.update(logits, target)")
        return brier_of_rows(probabilities(scores, self.from_logits), targets)


class BrierDecomposition(BinnedMetric):
    """The Brier score and the parts it adds up from, exact over batches and ranks.

    See :func:`brier_decomposition`. Judged by the top label, the score is the mean of
    ``(confidence - correctness)^2``. Of ``view="classwise"`` the parts of all classes are added
    up (``average="macro"``), so that the score is that of
    :class:`~lightning_reg.metrics.BrierScore`; those of a multilabel task are averaged over
    labels.

    Args:
        kwargs: those of :class:`~lightning_reg.metrics.binned.BinnedMetric`.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import BrierDecomposition
        >>> metric = BrierDecomposition(from_logits=False, task="binary")
        >>> metric.update(torch.tensor([0.25, 0.25, 0.75]), torch.tensor([0, 1, 1]))
        >>> metric.compute()["brier"]
        tensor(0.2292, dtype=torch.float64)
    """

    papers = (
        Paper("A New Vector Partition of the Probability Score", "Murphy", 1973),
        Paper("Two Extra Components in the Brier Score Decomposition", "Stephenson et al.", 2008),
    )
    function = staticmethod(brier_decomposition)

    def value(self) -> dict[str, Tensor]:
        """The score and its parts, by name."""
        if self.view != "classwise" or self.average == "none":
            return brier_parts(self.moments())._asdict()
        if self.average == "micro":
            return brier_parts(self.moments().over_classes())._asdict()
        parts = brier_parts(self.moments())
        join = mean_over_classes if self.task == "multilabel" else _total
        return BrierParts(*(join(part) for part in parts))._asdict()


def _total(values: Tensor) -> Tensor:
    return values.sum(0)
