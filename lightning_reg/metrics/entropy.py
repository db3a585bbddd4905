"""How undecided a classifier's predictions are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.dense import DenseMean
from lightning_reg.metrics.inputs import Task, log_probabilities

__all__ = ["PredictiveEntropy", "predictive_entropy"]


def predictive_entropy(
    preds: Tensor,
    target: Tensor | None = None,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    normalized: bool = False,
    class_dim: int = 1,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The mean entropy of predicted distributions, ``1/N sum_i -sum_k p_ik log p_ik``, in nats.

    For pixels ``class_dim=1`` and (N, C, H, W); for tokens ``class_dim=-1`` and (N, T, V), which
    makes it the token entropy of a language model.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, (N, ...) of the positive class for ``"binary"``.
        target: class indices, only needed to say with ``ignore_index`` which positions count.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        normalized: divide by ``log C`` (``log 2``): 0 is certain, 1 uniform.
        class_dim: the dimension of the classes, where it is not 1.
        ignore_index: positions with this class index do not count.
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
    metric = PredictiveEntropy(
        from_logits=from_logits,
        task=task,
        normalized=normalized,
        class_dim=class_dim,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def entropy_of_rows(scores: Tensor, from_logits: bool, normalized: bool = False) -> Tensor:
    """The entropy of each row (N,), in nats or in units of ``log C``."""
    entropy = entropy_of_logs(log_probabilities(scores, from_logits))
    classes = 2 if scores.ndim == 1 else scores.shape[1]
    return entropy / math.log(classes) if normalized else entropy


def entropy_of_logs(logs: Tensor) -> Tensor:
    """The entropy of distributions over the last dimension, from their logarithms, in nats."""
    # xlogy's convention, in terms of the logarithm: a probability of 0 contributes 0.
    return -(logs.exp() * logs.clamp_min(torch.finfo(logs.dtype).min)).sum(-1)


def entropy_of_shares(shares: Tensor) -> Tensor:
    """The entropy of distributions over the last dimension, in nats."""
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy


class PredictiveEntropy(DenseMean):
    """The mean entropy of predictions in nats, exact over batches and ranks.

    See :func:`predictive_entropy`. The mean over samples of the entropy of each one's prediction
    is the conditional entropy of the label given the input, under the model. The state is a
    float64 sum (float32 on MPS) and an int64 count.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        normalized: divide by the logarithm of the number of classes.
        class_dim: the dimension of the classes: 1 for (N, C, ...), -1 for (N, T, V).
        ignore_index: positions with this class index do not count; ``update`` then needs targets.
        validate_args: check values, which costs a host sync a block of a batch.
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
