"""What depends on the order of confidences, and kernel estimates."""

import torch

from lightning_reg.metrics import AURC, CalibrationError, PredictiveEntropy
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

KEEPS = {
    "constant": "exact=True keeps every confidence, as it says",
    "collectives": "exact=True gathers every confidence, as it says",
}
KEPT = {"exact": True}
WITHIN = "only the pairs within an update are counted, as it says"


def _case(data, kept=False, **args):
    function_args = dict(args)
    return MetricCase(
        args={**args, **(KEPT if kept else {})},
        function_args=function_args,
        data=data,
        bad=((LOGITS[:4], TARGETS[:3]), (TARGETS, TARGETS), (LOGITS,)),
        exemptions=KEEPS if kept else {},
    )


def _usual(soft=True, **args):
    """Labels, soft labels, probabilities, ignored positions, two classes, kept confidences."""
    found = [
        _case((LOGITS, TARGETS), from_logits=True, **args),
        _case((PROBABILITIES, TARGETS), from_logits=False, **args),
        _case((LOGITS, IGNORED), from_logits=True, ignore_index=-100, **args),
        _case((BINARY_LOGITS, BINARY_TARGETS), from_logits=True, task="binary", **args),
        _case((LOGITS, TARGETS), kept=True, from_logits=True, **args),
    ]
    return [*found, _case((LOGITS, SOFT), from_logits=True, **args)] if soft else found


def _always_kept(**args):
    return [
        MetricCase(args={"from_logits": True, **args}, data=(LOGITS, TARGETS), exemptions=KEEPS),
        MetricCase(
            args={"from_logits": True, "task": "binary", **args},
            data=(BINARY_LOGITS, BINARY_TARGETS),
            exemptions=KEEPS,
        ),
    ]


GROUPS = torch.arange(60) ** 2 % 7 % 4


def _grouped(metric, data, **case):
    args = {"metric": metric, "num_groups": 5}
    return MetricCase(args=args, data=(*data, GROUPS), **case)


CASES = {
    "AUGRC": _usual(),
    "AURC": _usual(),
    "ByGroup": [
        _grouped(
            CalibrationError(from_logits=True),
            (LOGITS, TARGETS),
            bad=((LOGITS, TARGETS, GROUPS + 4), (LOGITS, TARGETS, GROUPS[:5]), (LOGITS, TARGETS)),
        ),
        _grouped(AURC(from_logits=True, ignore_index=-100, resolution=4096), (LOGITS, IGNORED)),
        _grouped(AURC(from_logits=True, exact=True), (LOGITS, TARGETS), exemptions=KEEPS),
        _grouped(PredictiveEntropy(from_logits=True), (LOGITS,)),
    ],
    "CoverageAtRisk": _usual(risk=0.5),
    "EqualMassCalibrationError": [
        *_usual(n_bins=7),
        *_usual(n_bins=7, norm="l2")[:1],
        *_usual(n_bins=7, norm="max")[:1],
        *_usual(soft=False, n_bins=7, norm="l2", debiased=True)[:1],
    ],
    "ExcessAURC": _usual(soft=False),
    "KernelDensityCalibrationError": _always_kept(bandwidth=0.1),
    "KolmogorovSmirnovCalibrationError": [*_usual(), *_usual(normalized=True)[:1]],
    "KuiperCalibrationError": [*_usual(), *_usual(normalized=True)[:1]],
    "MaximumMeanCalibrationError": _usual(),
    "OperatingPointInconsistency": [
        MetricCase(
            args={"resolution": 64},
            data=(LOGITS, TARGETS),
            bad=((LOGITS, TARGETS[:5]), (LOGITS, TARGETS.double()), (LOGITS[:, 0], TARGETS)),
            exemptions=KEEPS,
        ),
        MetricCase(
            args={"pairs": "batch", "num_classes": 5, "resolution": 64},
            function_args={"resolution": 64},
            data=(LOGITS, TARGETS),
            bad=((LOGITS, TARGETS + 1),),
            exemptions=dict.fromkeys(
                ("batches", "forward", "checkpoint", "merge", "inference", "ranks"),
                "only the pairs within an update are counted, as it says",
            ),
        ),
    ],
    "RiskAtCoverage": _usual(coverage=0.7),
    "SmoothCalibrationError": [*_usual(), *_usual(bandwidth=0.1)[:1]],
    "SquaredKernelCalibrationError": [
        *_always_kept(estimator="unbiased"),
        *_always_kept(estimator="biased", kernel="gaussian"),
        MetricCase(
            args={"from_logits": True, "estimator": "unbiased", "ignore_index": -100},
            data=(LOGITS, IGNORED),
            exemptions=KEEPS,
        ),
        MetricCase(
            args={"from_logits": True, "estimator": "block", "block_size": 5},
            data=(LOGITS, SOFT),
            bad=((LOGITS[:4], TARGETS[:3]), (LOGITS,)),
            exemptions=dict.fromkeys(
                ("batches", "order", "ranks"),
                "pairs are formed within blocks of the samples of an update, as it says",
            ),
        ),
    ],
    "SweepCalibrationError": _usual(),
}
