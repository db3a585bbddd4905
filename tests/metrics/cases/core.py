"""Calibration errors and proper scores."""

import torch

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

BAD = (
    (LOGITS[:, 0], TARGETS),
    (LOGITS[:4], TARGETS[:3]),
    (LOGITS, torch.full((60,), 5)),
    (TARGETS, TARGETS),
)


def _usual(**args):
    """Labels, soft labels, probabilities, ignored positions and two classes."""
    binary = {"task": "binary", **args}
    return [
        MetricCase(args={"from_logits": True, **args}, data=(LOGITS, TARGETS), bad=BAD),
        MetricCase(args={"from_logits": True, **args}, data=(LOGITS, SOFT)),
        MetricCase(args={"from_logits": False, **args}, data=(PROBABILITIES, TARGETS)),
        MetricCase(
            args={"from_logits": True, "ignore_index": -100, **args}, data=(LOGITS, IGNORED)
        ),
        MetricCase(args={"from_logits": True, **binary}, data=(BINARY_LOGITS, BINARY_TARGETS)),
    ]


CASES = {
    "CalibrationError": [*_usual(), *_usual(norm="l2")[:1], *_usual(norm="max", n_bins=7)[:1]],
    "ExpectedAccuracy": _usual(),
    "NegativeLogLikelihood": _usual(),
}
