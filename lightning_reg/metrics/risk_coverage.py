"""Single points of the curve of risk against coverage."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_reg.engine.errors import check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.inputs import Task
from lightning_reg.metrics.ranking import (
    Ranked,
    SelectiveMetric,
    largest_coverage,
    risk_of_first,
)

__all__ = ["CoverageAtRisk", "RiskAtCoverage", "coverage_at_risk", "risk_at_coverage"]

_PAPER = Paper(
    "Selective Classification for Deep Neural Networks", "Geifman & El-Yaniv", 2017, "1705.08500"
)


def risk_at_coverage(
    preds: Tensor,
    target: Tensor,
    *,
    coverage: float,
    from_logits: bool,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """The risk of the share ``coverage`` that is most confident; see :class:`RiskAtCoverage`.

    Arguments, result and errors as in :func:`aurc`.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
        >>> target = torch.tensor([0, 1, 0])
        >>> risk_at_coverage(probabilities, target, coverage=0.6, from_logits=False)
        tensor(0.5000, dtype=torch.float64)
    """
    metric = RiskAtCoverage(
        from_logits=from_logits,
        task=task,
        coverage=coverage,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


def coverage_at_risk(
    preds: Tensor,
    target: Tensor,
    *,
    risk: float,
    from_logits: bool,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """The largest coverage whose risk is at most ``risk``; see :class:`CoverageAtRisk`.

    Arguments, result and errors as in :func:`aurc`.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
        >>> coverage_at_risk(probabilities, torch.tensor([0, 0, 1]), risk=0.1, from_logits=False)
        tensor(0.6667, dtype=torch.float64)
    """
    metric = CoverageAtRisk(
        from_logits=from_logits,
        task=task,
        risk=risk,
        exact=True,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )
    value: Tensor = evaluate(metric, preds, target)
    return value


class RiskAtCoverage(SelectiveMetric):
    """The risk of the most confident share of predictions.

    Geifman & El-Yaniv (2017), Selective Classification for Deep Neural Networks,
    arXiv:1705.08500. The mean error of the ``ceil(coverage N)`` most confident of N predictions;
    where only some of a tied group are among them, the mean over the choices.

    Args:
        coverage: the share that is accepted, in (0, 1].
        kwargs: those of :class:`~lightning_reg.metrics.AURC`.

    Note:
        ``error_bound()`` is the distance to the risk with the errors of each cell of the
        histogram first or last. As torch-uncertainty 0.13 where confidences are distinct; there
        tied predictions count in the order in which they came.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import RiskAtCoverage
        >>> metric = RiskAtCoverage(coverage=0.5, from_logits=False)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    function = staticmethod(risk_at_coverage)
    papers = (_PAPER,)

    def __init__(self, *, coverage: float, from_logits: bool, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        _check_share(self, "coverage", coverage, low_open=True)
        self.coverage = coverage

    def read(self, ranked: Ranked) -> Tensor:
        """The mean error of the accepted."""
        return _risk_at(ranked, self.coverage)


class CoverageAtRisk(SelectiveMetric):
    """The largest share of predictions that can be accepted at a given risk.

    Geifman & El-Yaniv (2017), Selective Classification for Deep Neural Networks,
    arXiv:1705.08500. ``max k / N`` over the k whose :class:`RiskAtCoverage` is at most ``risk``;
    0 if there is none (torch-uncertainty 0.13 gives NaN). Of tied predictions any number may be
    accepted, at their mean error.

    Args:
        risk: the error rate that is allowed, in [0, 1].
        kwargs: those of :class:`~lightning_reg.metrics.AURC`.

    Note:
        ``error_bound()`` is the distance to the coverage with the errors of each cell of the
        histogram first or last. It can be large where the curve of risk is flat.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import CoverageAtRisk
        >>> metric = CoverageAtRisk(risk=0.1, from_logits=False)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    function = staticmethod(coverage_at_risk)
    papers = (_PAPER,)
    higher_is_better = True

    def __init__(self, *, risk: float, from_logits: bool, **kwargs: Any) -> None:
        super().__init__(from_logits=from_logits, **kwargs)
        _check_share(self, "risk", risk)
        self.risk = risk

    def read(self, ranked: Ranked) -> Tensor:
        """The largest share of the risk that is allowed."""
        return largest_coverage(ranked, self.risk)


def _risk_at(ranked: Ranked, coverage: float) -> Tensor:
    # A product such as 0.07 * 100 must not be rounded up past the whole number that it means.
    accepted = (coverage * ranked.total * (1 - 1e-12)).ceil().clamp_min(1)
    return risk_of_first(ranked, accepted.unsqueeze(0)).squeeze(0)


def _check_share(owner: object, name: str, value: float, low_open: bool = False) -> None:
    check_range(owner, name, value, 0, 1, low_open=low_open, cure=f"{name}=0.1")
