"""How well confidence sorts right from wrong predictions: areas under risk against coverage."""

from __future__ import annotations

from torch import Tensor

from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.inputs import Task
from lightning_reg.metrics.ranking import (
    Ranked,
    SelectiveMetric,
    area_under_generalized_risk,
    area_under_risk,
    least_area_under_risk,
)

__all__ = ["AUGRC", "AURC", "ExcessAURC", "augrc", "aurc", "excess_aurc"]

_GEIFMAN_2017 = Paper(
    "Selective Classification for Deep Neural Networks", "Geifman & El-Yaniv", 2017, "1705.08500"
)
_GEIFMAN_2019 = Paper(
    "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers",
    "Geifman et al.",
    2019,
    "1805.08206",
)
_TRAUB = Paper(
    "Overcoming Common Flaws in the Evaluation of Selective Classification Systems",
    "Traub et al.",
    2024,
    "2407.01032",
)


def aurc(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    r"""The area under the risk-coverage curve.

    With the N predictions sorted by falling confidence and ``e_i`` their errors,
    ``AURC = 1/N sum_k r_k``, ``r_k = 1/k sum_(i <= k) e_i``: the mean risk of accepting the k most
    confident ones. Where confidences are equal, the mean over all orders of the tied ones, in
    closed form: a group of m of them with E errors, after M predictions with S errors, adds
    ``E + (S - M E/m) (H(M + m) - H(M))`` with the harmonic numbers H. No order of the samples
    changes the value.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, (N, ...) for ``"binary"``. Confidence is the
            probability of the predicted class.
        target: class indices (N, ...), or soft targets of the shape of ``preds``: an error is
            then the probability that the target gives to the other classes.
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
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
        >>> aurc(probabilities, torch.tensor([0, 0, 1]), from_logits=False)
        tensor(0.1111, dtype=torch.float64)
    """
    metric = AURC(
        from_logits=from_logits,
        task=task,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def excess_aurc(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """AURC minus that of the best order, all errors last; see :class:`ExcessAURC`.

    Arguments, result and errors as in :func:`aurc`; targets are class indices.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
        >>> excess_aurc(probabilities, torch.tensor([0, 0, 1]), from_logits=False)
        tensor(0., dtype=torch.float64)
    """
    metric = ExcessAURC(
        from_logits=from_logits,
        task=task,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def augrc(
    preds: Tensor,
    target: Tensor,
    *,
    from_logits: bool,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """The area under the generalized risk-coverage curve; see :class:`AUGRC`.

    Arguments, result and errors as in :func:`aurc`.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
        >>> augrc(probabilities, torch.tensor([0, 0, 1]), from_logits=False)
        tensor(0.0556, dtype=torch.float64)
    """
    metric = AUGRC(
        from_logits=from_logits,
        task=task,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class AURC(SelectiveMetric):
    """The area under the risk-coverage curve, exact over batches, ranks and ties.

    Geifman & El-Yaniv (2017), Selective Classification for Deep Neural Networks,
    arXiv:1705.08500. See :func:`aurc` for the formula. It is low if wrong predictions have low
    confidence, and not above the error rate of a random order by much.

    Other definitions differ: torch-uncertainty 0.13 takes trapezoids from the first prediction on
    and divides by ``1 - 1/N``, and leaves ties in the order in which they came; fd-shifts takes
    trapezoids between the distinct confidences, which is not the mean over the orders of tied
    predictions. This is the paper's sum, and that mean.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``; both are judged by the predicted class.
        exact: keep every confidence instead of a histogram; see
            :class:`~lightning_reg.metrics.fine_histogram.OrderMetric`.
        resolution: the number of cells of the histogram.
        ignore_index: positions with this class index do not count.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        From the histogram, predictions of one cell count as tied. The exact value lies between
        the areas with each cell's errors before and after its right predictions;
        ``error_bound()`` is the distance to the farther one.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import AURC
        >>> metric = AURC(from_logits=False)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    function = staticmethod(aurc)
    papers = (_GEIFMAN_2017,)

    def read(self, ranked: Ranked) -> Tensor:
        """The area under the risk-coverage curve."""
        return area_under_risk(ranked)


class ExcessAURC(SelectiveMetric):
    """AURC minus the least that its error rate allows (E-AURC).

    Geifman, Uziel & El-Yaniv (2019), Bias-Reduced Uncertainty Estimation for Deep Neural
    Classifiers, arXiv:1805.08206. The least area is that of the order with all E errors last,
    ``1/N (E - (N - E) (H(N) - H(N - E)))``: 0 means that confidence sorts perfectly. The paper
    approximates it by ``r + (1 - r) log(1 - r)`` with the error rate r, from which it differs by
    O(1/N); the sum is taken here, so that the excess is never negative.

    Targets are class indices: with soft targets no order of the predictions is the best one for
    all labels that may be drawn.

    Args:
        kwargs: those of :class:`AURC`.

    Note:
        ``error_bound()`` is that of :class:`AURC`: the least area depends on the error rate only.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ExcessAURC
        >>> metric = ExcessAURC(from_logits=False)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    function = staticmethod(excess_aurc)
    papers = (_GEIFMAN_2019,)

    def labels_only(self) -> str | None:
        """There is no best order of soft targets."""
        return "with soft targets there is no best order"

    def read(self, ranked: Ranked) -> Tensor:
        """The area that a perfect order would save."""
        return _excess(ranked)


class AUGRC(SelectiveMetric):
    """The area under the generalized risk-coverage curve: an error counts alike wherever it is.

    Traub et al. (2024), Overcoming Common Flaws in the Evaluation of Selective Classification
    Systems, arXiv:2407.01032. The generalized risk at a threshold is the share of all predictions
    that is accepted and wrong; ``AUGRC`` is its integral over coverage from 0 to 1, between the
    attainable thresholds by trapezoids: ``1/N^2 sum_g m_g (S_g + E_g / 2)`` over groups g of m
    tied predictions with E errors after S errors. Equal to
    ``(1 - AUROC) acc (1 - acc) + (1 - acc)^2 / 2``, with the area under the ROC curve of
    confidence as a detector of right predictions.

    As in the paper's fd-shifts (without its factor 1000). torch-uncertainty 0.13 starts the
    integral at the first prediction and divides by ``1 - 1/N``.

    Args:
        kwargs: those of :class:`AURC`.

    Note:
        ``error_bound()`` as for :class:`AURC`, from the orders within the cells.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import AUGRC
        >>> metric = AUGRC(from_logits=False)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.1250, dtype=torch.float64)
    """

    function = staticmethod(augrc)
    papers = (_TRAUB,)
    plot_upper_bound = 0.5

    def read(self, ranked: Ranked) -> Tensor:
        """The area under the generalized risk."""
        return area_under_generalized_risk(ranked)


def _excess(ranked: Ranked) -> Tensor:
    return (area_under_risk(ranked) - least_area_under_risk(ranked)).clamp_min(0)
