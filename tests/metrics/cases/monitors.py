"""Metrics that monitors brought."""

from lightning_reg.testing import MetricCase
from tests.metrics.cases.data import (
    BINARY_LOGITS,
    BINARY_TARGETS,
    IGNORED,
    LOGITS,
    PROBABILITIES,
    SOFT,
    TARGETS,
)

CASES = {
    "ProbabilityMargin": [
        MetricCase(
            args={"from_logits": True}, data=(LOGITS, TARGETS), bad=((LOGITS, TARGETS[1:]),)
        ),
        MetricCase(
            args={"from_logits": False, "ignore_index": -100}, data=(PROBABILITIES, IGNORED)
        ),
        MetricCase(args={"from_logits": True}, data=(LOGITS, SOFT)),
        MetricCase(
            args={"from_logits": True, "task": "binary"}, data=(BINARY_LOGITS, BINARY_TARGETS)
        ),
    ],
}
