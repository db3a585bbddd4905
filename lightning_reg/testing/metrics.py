"""Holds a metric to the contract, a user's own as well as the package's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torchmetrics import Metric

from lightning_reg.testing.errors import ContractError
from lightning_reg.testing.metric_case import MetricCase
from lightning_reg.testing.metric_checks import METRIC_CHECKS, MetricSubject


def check_metric(
    cls: type[Metric], case: MetricCase, checks: Iterable[str] | None = None
) -> dict[str, str]:
    """Check that a metric does what the metrics of this package promise.

    Args:
        cls: the metric.
        case: how to build and feed it.
        checks: names of :data:`METRIC_CHECKS`; all by default.

    Returns:
        For each check ``"kept"``, or the reason why it was not run.

    Raises:
        ContractError: at the first promise that is broken.

    Example:
        >>> import torch
        >>> from lightning_reg.testing import MetricCase, check_metric
        >>> from lightning_reg.metrics import CalibrationError
        >>> logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
        >>> case = MetricCase(args={"from_logits": True}, data=(logits, torch.arange(60) % 5))
        >>> check_metric(CalibrationError, case, ["batches", "reuse"])
        {'batches': 'kept', 'reuse': 'kept'}
    """
    names = list(METRIC_CHECKS if checks is None else checks)
    unknown = (set(names) | set(case.exemptions)) - set(METRIC_CHECKS)
    if unknown:
        raise ValueError(f"no checks: {sorted(unknown)}; checks are {', '.join(METRIC_CHECKS)}")
    subject, answers = MetricSubject(cls, case), {}
    for name in names:
        if name in case.exemptions:
            answers[name] = f"exempt: {case.exemptions[name]}"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                METRIC_CHECKS[name](subject)
        except ContractError as error:
            raise error.of_check(name) from None
        answers[name] = "kept"
    return answers
