"""How spread predictions are over the classes, and how undecided within each class."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.classes import ClassesMetric
from lightning_reg.metrics.entropy import entropy_of_rows, entropy_of_shares
from lightning_reg.metrics.inputs import Rows, log_probabilities

By = Literal["target", "prediction"]
_BY = ("target", "prediction")

__all__ = ["ClassEntropy", "MarginalEntropy", "class_entropy", "marginal_entropy"]


def marginal_entropy(
    preds: Tensor,
    target: Tensor | None = None,
    *,
    num_classes: int,
    from_logits: bool,
    normalized: bool = False,
    class_dim: int = 1,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The entropy of the mean prediction, ``H(1/N sum_i p_i)``, in nats.

    Low if the model predicts few of the classes. Less :func:`predictive_entropy`, it is the
    mutual information of inputs and predicted labels.

    Args:
        preds: (N, C, ...) predictions.
        target: class indices, only needed to say with ``ignore_index`` which positions count.
        num_classes: C.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        normalized: divide by ``log C``.
        class_dim: the dimension of the classes, where it is not 1.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if there is no row.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> marginal_entropy(torch.eye(2), from_logits=False, num_classes=2)
        tensor(0.6931, dtype=torch.float64)
    """
    metric = MarginalEntropy(
        num_classes=num_classes,
        from_logits=from_logits,
        normalized=normalized,
        class_dim=class_dim,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def class_entropy(
    preds: Tensor,
    target: Tensor | None = None,
    *,
    num_classes: int,
    from_logits: bool,
    by: By = "target",
    normalized: bool = False,
    class_dim: int = 1,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """The mean entropy of predictions for each class, in nats.

    Args:
        preds: (N, C, ...) predictions.
        target: (N, ...) class indices; not needed if ``by`` is ``"prediction"``.
        num_classes: C.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        by: whether a sample belongs to its ``"target"`` or to its ``"prediction"``, the top class.
        normalized: divide by ``log C``.
        class_dim: the dimension of the classes, where it is not 1.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        (C,) float64 (float32 on MPS); NaN for a class without samples.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> preds = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
        >>> class_entropy(preds, torch.tensor([0, 1]), from_logits=False, num_classes=2)
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    metric = ClassEntropy(
        num_classes=num_classes,
        from_logits=from_logits,
        by=by,
        normalized=normalized,
        class_dim=class_dim,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class MarginalEntropy(ClassesMetric):
    """The entropy of the mean prediction in nats: how many classes the model predicts at all.

    See :func:`marginal_entropy`. The state is C float64 sums (float32 on MPS) and a count. Ranks
    are joined by their sums: the entropy of the joint mean is above the mean of their entropies.

    Args:
        num_classes: C.
        from_logits: whether predictions are logits or probabilities; never guessed.
        normalized: divide by ``log C``.
        kwargs: ``class_dim``, ``ignore_index``, ``validate_args``, and those of
            ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import MarginalEntropy
        >>> metric = MarginalEntropy(num_classes=2, from_logits=False)
        >>> metric.update(torch.eye(2))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    function = staticmethod(marginal_entropy)
    probability_sum: Tensor
    count: Tensor

    def __init__(
        self, *, num_classes: int, from_logits: bool, normalized: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_classes=num_classes, from_logits=from_logits, **kwargs)
        self.normalized = normalized
        self.add_total("probability_sum", num_classes)
        self.add_count("count")

    def accumulate(self, rows: Rows) -> None:
        """Add the block's probabilities."""
        self.refuse_other_width(rows)
        probabilities = log_probabilities(rows.scores, self.from_logits).exp()
        self.probability_sum = self.probability_sum + probabilities.sum(0).to(self.probability_sum)
        self.count = self.count + len(probabilities)

    def value(self) -> Tensor:
        """The entropy of the mean of everything that was counted."""
        entropy = entropy_of_shares(self.probability_sum / self.count)
        return entropy / math.log(self.num_classes) if self.normalized else entropy


class ClassEntropy(ClassesMetric):
    """The mean entropy of predictions for each true or predicted class, in nats.

    See :func:`class_entropy`. The state is C float64 sums (float32 on MPS) and C counts.

    Args:
        num_classes: C.
        from_logits: whether predictions are logits or probabilities; never guessed.
        by: ``"target"`` or ``"prediction"``.
        normalized: divide by ``log C``.
        kwargs: ``class_dim``, ``ignore_index``, ``validate_args``, and those of
            ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ClassEntropy
        >>> metric = ClassEntropy(num_classes=2, from_logits=False)
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """

    function = staticmethod(class_entropy)
    total: Tensor
    count: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        from_logits: bool,
        by: By = "target",
        normalized: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, from_logits=from_logits, **kwargs)
        if by not in _BY:
            raise ArgumentError(
                self, f"`by` must be one of {', '.join(_BY)}, got {by!r}", cure='by="target"'
            )
        self.by: By = by
        self.normalized = normalized
        self.add_total("total", num_classes)
        self.add_count("count", num_classes)

    def accumulate(self, rows: Rows) -> None:
        """Add the block's entropies to their classes."""
        self.refuse_other_width(rows)
        index = rows.scores.argmax(1) if self.by == "prediction" else self._labels(rows)
        entropy = entropy_of_rows(rows.scores, self.from_logits, self.normalized)
        self.total = self.total.index_add(0, index, entropy.to(self.total))
        self.count = self.count.index_add(0, index, torch.ones_like(index))

    def value(self) -> Tensor:
        """The mean for each class over everything that was counted."""
        return self.total / self.count

    def _labels(self, rows: Rows) -> Tensor:
        labels = self.targets(rows)
        if labels.is_floating_point():
            raise ArgumentError(
                self, "needs class indices, not soft targets", cure="target.argmax(1)"
            )
        return labels.long()
