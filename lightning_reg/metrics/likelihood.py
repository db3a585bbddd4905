"""How probable the targets are under the predictions, and how often the top class is right."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.exact import MeanMetric
from lightning_reg.metrics.inputs import (
    Task,
    high_precision,
    log_probabilities,
    log_probability_of,
    top_class,
)

__all__ = [
    "ExpectedAccuracy",
    "NegativeLogLikelihood",
    "expected_accuracy",
    "negative_log_likelihood",
]


def negative_log_likelihood(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """The mean of ``-log p(target)`` in nats; with soft targets their cross-entropy.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, (N, ...) for ``"binary"``.
        target: class indices (N, ...), or soft targets of the shape of ``preds``.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts, infinite where a target has
        probability 0.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> negative_log_likelihood(torch.zeros(1, 4), torch.tensor([2]), from_logits=True)
        tensor(1.3863, dtype=torch.float64)
    """
    metric = NegativeLogLikelihood(
        from_logits=from_logits, task=task, ignore_index=ignore_index, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def expected_accuracy(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """The share of right top classes; with soft targets, the target's mass on the top class.

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
        >>> expected_accuracy(torch.eye(2), torch.tensor([0, 0]), from_logits=True)
        tensor(0.5000, dtype=torch.float64)
    """
    metric = ExpectedAccuracy(
        from_logits=from_logits, task=task, ignore_index=ignore_index, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def nll_of_rows(scores: Tensor, targets: Tensor, from_logits: bool) -> Tensor:
    """The negative log-likelihood of each row (N,)."""
    if scores.ndim == 2 and not targets.is_floating_point():
        return -log_probability_of(scores, targets, from_logits)
    logs = log_probabilities(scores, from_logits)
    if not targets.is_floating_point():
        return -logs.gather(1, targets.unsqueeze(1)).squeeze(1)
    targets = high_precision(targets)
    if targets.ndim == 1:
        targets = torch.stack([1 - targets, targets], 1)
    # A class that the target excludes contributes 0, whatever its probability.
    return -torch.where(targets > 0, targets * logs, torch.zeros_like(logs)).sum(1)


def correct_of_rows(scores: Tensor, targets: Tensor, from_logits: bool) -> Tensor:
    """The correctness of each row's top class (N,)."""
    if scores.ndim == 1:
        positive = scores >= (0.0 if from_logits else 0.5)
        targets = high_precision(targets)
        return torch.where(positive, targets, 1 - targets)
    top = top_class(scores)
    if targets.is_floating_point():
        return high_precision(targets.gather(1, top.unsqueeze(1)).squeeze(1))
    return high_precision(top == targets)


class NegativeLogLikelihood(MeanMetric):
    """The mean of ``-log p(target)`` in nats; with soft targets their cross-entropy.

    The state is a float64 sum (float32 on MPS) and an int64 count. Infinite where a target has
    probability 0.

    Args:
        kwargs: those of :class:`~lightning_reg.metrics.exact.ExactMetric`.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import NegativeLogLikelihood
        >>> metric = NegativeLogLikelihood(from_logits=True)
        >>> metric.update(torch.zeros(1, 4), torch.tensor([2]))
        >>> metric.compute()
        tensor(1.3863, dtype=torch.float64)
    """

    function = staticmethod(negative_log_likelihood)
    higher_is_better = False
    plot_lower_bound = 0.0

    def values(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """The negative log-likelihood of each row."""
        if targets is None:
            raise ArgumentError(self, "needs targets", cure="metric.update(logits, target)")
        return nll_of_rows(scores, targets, self.from_logits)


class ExpectedAccuracy(MeanMetric):
    """The share of right top classes; with soft targets, the target's mass on the top class.

    Args:
        kwargs: those of :class:`~lightning_reg.metrics.exact.ExactMetric`.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ExpectedAccuracy
        >>> metric = ExpectedAccuracy(from_logits=True)
        >>> metric.update(torch.eye(2), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    function = staticmethod(expected_accuracy)
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def values(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """The correctness of each row."""
        if targets is None:
            raise ArgumentError(self, "needs targets", cure="metric.update(logits, target)")
        return correct_of_rows(scores, targets, self.from_logits)
