"""Calibration errors and proper scores."""

import torch

from lightning_reg.testing import MetricCase
from tests.metrics.cases.data import (
    BINARY_LOGITS,
    BINARY_TARGETS,
    IGNORED,
    LABELS,
    LABELS_IGNORED,
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


def _views(**args):
    """What else bins can judge."""
    return [
        MetricCase(
            args={"from_logits": True, "view": "classwise", "num_classes": 5, **args},
            data=(LOGITS, TARGETS),
            function_args={"from_logits": True, "view": "classwise", **args},
            bad=(*BAD, (LOGITS[:, :3], TARGETS % 3)),
        ),
        MetricCase(
            args={
                "from_logits": True,
                "view": "classwise",
                "num_classes": 5,
                "average": "none",
                "threshold": 0.1,
                **args,
            },
            data=(LOGITS, SOFT),
            function_args={
                "from_logits": True,
                "view": "classwise",
                "average": "none",
                "threshold": 0.1,
                **args,
            },
        ),
        MetricCase(
            args={"from_logits": True, "view": "top_k", "top_k": 2, **args}, data=(LOGITS, TARGETS)
        ),
        MetricCase(
            args={"from_logits": False, "task": "binary", "view": "top_label", **args},
            data=(BINARY_LOGITS.sigmoid(), BINARY_TARGETS),
        ),
        MetricCase(
            args={"from_logits": True, "task": "multilabel", "num_classes": 5, **args},
            data=(LOGITS, LABELS),
            function_args={"from_logits": True, "task": "multilabel", **args},
        ),
        MetricCase(
            args={
                "from_logits": True,
                "task": "multilabel",
                "num_classes": 5,
                "average": "micro",
                "ignore_index": 7,
                **args,
            },
            data=(LOGITS, LABELS_IGNORED),
            function_args={
                "from_logits": True,
                "task": "multilabel",
                "average": "micro",
                "ignore_index": 7,
                **args,
            },
        ),
    ]


CASES = {
    "CalibrationError": [
        *_usual(),
        *_views(),
        *_usual(norm="l2", debiased=True)[:2],
        *_usual(norm="max", n_bins=7)[:1],
    ],
    "AverageCalibrationError": [*_usual()[:2], *_views()[1:2]],
    "OverconfidenceError": [_usual()[0], *_usual(weighted=True)[:1]],
    "UnderconfidenceError": [_usual()[0], *_usual(weighted=True)[:1]],
    "BrierDecomposition": [*_usual()[:2], *_views()],
    "BrierScore": _usual(),
    "CalibrationSuite": [
        *_usual(),
        *_usual(num_classes=5, sweep=(10, 20))[:2],
        *_usual(view="top_k", top_k=3)[:1],
    ],
    "CalibrationUncertainty": [
        case
        for norm in ("l1", "l2", "max")
        for case in (_usual(norm=norm, resamples=50)[i] for i in (0, 2, 3, 4))
    ],
    "ExpectedAccuracy": _usual(),
    "NegativeLogLikelihood": _usual(),
}
