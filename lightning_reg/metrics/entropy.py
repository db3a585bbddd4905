"""How undecided a classifier's predictions are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_reg.metrics.exact import MeanMetric
from lightning_reg.metrics.inputs import (
    Task,
    check_arguments,
    log_probabilities,
    read_rows,
)

__all__ = ["PredictiveEntropy", "predictive_entropy"]


def predictive_entropy(
    preds: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    normalized: bool = False,
    validate_args: bool = True,
) -> Tensor:
    r"""The mean entropy of predicted distributions, ``1/N sum_i -sum_k p_ik log p_ik``, in nats.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, (N, ...) of the positive class for ``"binary"``.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        normalized: divide by ``log C`` (``log 2``): 0 is certain, 1 uniform.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if there is no row.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> predictive_entropy(torch.zeros(1, 4), from_logits=True)
        tensor(1.3863, dtype=torch.float64)
    """
    owner = "predictive_entropy"
    check_arguments(owner, task, from_logits)
    rows = read_rows(
        owner,
        preds,
        None,
        task=task,
        from_logits=from_logits,
        ignore_index=None,
        validate=validate_args,
    )
    return entropy_of_rows(rows.scores, from_logits, normalized).mean()


def entropy_of_rows(scores: Tensor, from_logits: bool, normalized: bool = False) -> Tensor:
    """The entropy of each row (N,), in nats or in units of ``log C``."""
    logs = log_probabilities(scores, from_logits)
    # xlogy's convention, in terms of the logarithm: a probability of 0 contributes 0.
    entropy = -(logs.exp() * logs.clamp_min(torch.finfo(logs.dtype).min)).sum(1)
    return entropy / math.log(logs.shape[1]) if normalized else entropy


class PredictiveEntropy(MeanMetric):
    """The mean entropy of predictions in nats, exact over batches and ranks.

    See :func:`predictive_entropy`. The state is a float64 sum (float32 on MPS) and an int64
    count.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        normalized: divide by the logarithm of the number of classes.
        ignore_index: positions with this class index do not count; ``update`` then needs targets.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import PredictiveEntropy
        >>> metric = PredictiveEntropy(from_logits=True, normalized=True)
        >>> metric.update(torch.zeros(5, 4))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    function = staticmethod(predictive_entropy)
    plot_lower_bound = 0.0

    def __init__(self, *, from_logits: bool, normalized: bool = False, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        self.normalized = normalized

    def values(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """The entropy of each row."""
        return entropy_of_rows(scores, self.from_logits, self.normalized)
