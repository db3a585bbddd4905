"""What predictions tell about the labels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.classes import ClassesMetric
from lightning_reg.metrics.entropy import entropy_of_shares
from lightning_reg.metrics.inputs import Rows, high_precision, log_probabilities

Given = Literal["target", "prediction"]
_GIVEN = ("target", "prediction")

__all__ = ["ConditionalEntropy", "LabelInformation", "conditional_entropy", "label_information"]


def conditional_entropy(
    preds: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    from_logits: bool,
    given: Given = "prediction",
    drawn: bool = False,
    class_dim: int = 1,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""What stays unknown of the label once the prediction is known, in nats.

    With the joint shares ``P(y, k)`` of label y and predicted class k:
    ``H(Y | K) = -sum_yk P(y, k) log(P(y, k) / P(k))``, or ``H(K | Y)`` with ``given="target"``.
    This is a plug-in value from C x C shares: with few samples it is biased towards 0, by about
    ``(C - 1)^2 / 2N``.

    Args:
        preds: (N, C, ...) predictions.
        target: (N, ...) class indices, or soft targets of the shape of ``preds``.
        num_classes: C.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        given: what is known: the ``"prediction"`` or the ``"target"``.
        drawn: the predicted class is a draw from the prediction, instead of its top class.
        class_dim: the dimension of the classes, where it is not 1.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if there is no row.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> preds = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> conditional_entropy(preds, torch.tensor([0, 1]), from_logits=False, num_classes=2)
        tensor(0.6931, dtype=torch.float64)
    """
    metric = ConditionalEntropy(
        num_classes=num_classes,
        from_logits=from_logits,
        given=given,
        drawn=drawn,
        class_dim=class_dim,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def label_information(
    preds: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    from_logits: bool,
    drawn: bool = False,
    class_dim: int = 1,
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The mutual information of label and predicted class, in nats.

    ``I(Y; K) = H(Y) + H(K) - H(Y, K)`` of the joint shares of label y and predicted class k. Equal
    to ``sklearn.metrics.mutual_info_score`` of labels and top classes. Biased upwards with few
    samples, as :func:`conditional_entropy` is downwards.

    Args:
        preds: (N, C, ...) predictions.
        target: (N, ...) class indices, or soft targets of the shape of ``preds``.
        num_classes: C.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        drawn: the predicted class is a draw from the prediction, instead of its top class.
        class_dim: the dimension of the classes, where it is not 1.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if there is no row.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> label_information(torch.eye(2), torch.tensor([1, 0]), from_logits=False, num_classes=2)
        tensor(0.6931, dtype=torch.float64)
    """
    metric = LabelInformation(
        num_classes=num_classes,
        from_logits=from_logits,
        drawn=drawn,
        class_dim=class_dim,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class _JointMetric(ClassesMetric):
    """Base of metrics of the joint shares of labels and predicted classes."""

    table: Tensor
    count: Tensor

    def __init__(
        self, *, num_classes: int, from_logits: bool, drawn: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_classes=num_classes, from_logits=from_logits, **kwargs)
        self.drawn = drawn
        self.add_total("table", num_classes, num_classes)
        self.add_count("count")

    def update_settings(self) -> tuple[Any, ...]:
        """The same for every metric of one table, whatever is read from it."""
        own = dict(super().update_settings()[1:])
        own.pop("given", None)
        return ("joint", *sorted(own.items()))

    def accumulate(self, rows: Rows) -> None:
        """Add the block to the table: labels down, predicted classes across."""
        self.refuse_other_width(rows)
        labels, table = self.targets(rows), self.table
        if self.drawn:
            predicted = log_probabilities(rows.scores, self.from_logits).exp()
        else:
            predicted = _one_hot(rows.scores.argmax(1), self.num_classes)
        if not labels.is_floating_point():
            table = table.index_add(0, labels.long(), predicted.to(table))
        else:
            table = table + (high_precision(labels).T @ predicted).to(table)
        self.table = table
        self.count = self.count + len(predicted)

    def joint(self) -> Tensor:
        """(C, C) shares of label and predicted class."""
        return self.table / self.count


class ConditionalEntropy(_JointMetric):
    """What stays unknown of the label once the predicted class is known, in nats.

    See :func:`conditional_entropy`. The state is C x C float64 sums (float32 on MPS) and a count;
    a collection of this and :class:`LabelInformation` counts once.

    Args:
        num_classes: C.
        from_logits: whether predictions are logits or probabilities; never guessed.
        given: ``"prediction"``: ``H(Y | K)``; ``"target"``: ``H(K | Y)``.
        drawn: the predicted class is a draw from the prediction, instead of its top class.
        kwargs: ``class_dim``, ``ignore_index``, ``validate_args``, and those of
            ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ConditionalEntropy
        >>> metric = ConditionalEntropy(num_classes=2, from_logits=False)
        >>> metric.update(torch.eye(2), torch.tensor([1, 0]))  # wrong, but tells the label
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    function = staticmethod(conditional_entropy)

    def __init__(
        self, *, num_classes: int, from_logits: bool, given: Given = "prediction", **kwargs: Any
    ) -> None:
        super().__init__(num_classes=num_classes, from_logits=from_logits, **kwargs)
        if given not in _GIVEN:
            raise ArgumentError(
                self,
                f"`given` must be one of {', '.join(_GIVEN)}, got {given!r}",
                cure='given="prediction"',
            )
        self.given: Given = given

    def value(self) -> Tensor:
        """The entropy over everything that was counted."""
        joint = self.joint()
        known = joint.sum(0 if self.given == "prediction" else 1)
        return entropy_of_shares(joint.flatten()) - entropy_of_shares(known)


class LabelInformation(_JointMetric):
    """The mutual information of label and predicted class, in nats.

    See :func:`label_information`. The state is C x C float64 sums (float32 on MPS) and a count.

    Args:
        num_classes: C.
        from_logits: whether predictions are logits or probabilities; never guessed.
        drawn: the predicted class is a draw from the prediction, instead of its top class.
        kwargs: ``class_dim``, ``ignore_index``, ``validate_args``, and those of
            ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import LabelInformation
        >>> metric = LabelInformation(num_classes=2, from_logits=False)
        >>> metric.update(torch.eye(2), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    function = staticmethod(label_information)
    higher_is_better = True

    def value(self) -> Tensor:
        """The information over everything that was counted."""
        joint = self.joint()
        parts = entropy_of_shares(joint.sum(0)) + entropy_of_shares(joint.sum(1))
        return parts - entropy_of_shares(joint.flatten())


def _one_hot(index: Tensor, classes: int) -> Tensor:
    return high_precision(torch.nn.functional.one_hot(index, classes))
