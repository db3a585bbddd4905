"""By how much the true class beats the others."""

from __future__ import annotations

from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.exact import MeanMetric
from lightning_reg.metrics.inputs import Task, high_precision, log_probabilities

__all__ = ["ProbabilityMargin", "probability_margin"]


def probability_margin(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The mean of ``p_y - max_(k != y) p_k``: 1 is certain and right, -1 certain and wrong.

    Positive exactly where the prediction is right. In probabilities, and not in logits, whose
    margin grows with their scale. With soft targets ``t`` the expectation over a label drawn from
    them, ``sum_y t_y (p_y - max_(k != y) p_k)``.

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
        >>> probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
        >>> probability_margin(probabilities, torch.tensor([0, 1]), from_logits=False)
        tensor(0., dtype=torch.float64)
    """
    metric = ProbabilityMargin(
        from_logits=from_logits, task=task, ignore_index=ignore_index, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class ProbabilityMargin(MeanMetric):
    """The mean margin of the true class's probability, exact over batches and ranks.

    See :func:`probability_margin`. The state is a float64 sum (float32 on MPS) and an int64 count.

    Args:
        kwargs: those of :class:`~lightning_reg.metrics.exact.ExactMetric`.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ProbabilityMargin
        >>> metric = ProbabilityMargin(from_logits=False)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    function = staticmethod(probability_margin)
    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def values(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """The margin of each row."""
        if targets is None:
            raise ArgumentError(self, "needs targets", cure="metric.update(logits, target)")
        if scores.ndim == 1:
            scores = high_precision(scores)
            positive = scores.sigmoid() if self.from_logits else scores
            return (2 * positive - 1) * (2 * high_precision(targets) - 1)
        chances = log_probabilities(scores, self.from_logits).exp()
        (first, second), (top, _) = (part.unbind(1) for part in chances.topk(2, dim=1))
        if not targets.is_floating_point():
            labels = targets.long()
            own = chances.gather(1, labels.unsqueeze(1)).squeeze(1)
            return own - second.where(top == labels, first)
        targets = high_precision(targets)
        on_top = targets.gather(1, top.unsqueeze(1)).squeeze(1)
        rest = targets.sum(1) - on_top
        return (targets * chances).sum(1) - on_top * second - rest * first
