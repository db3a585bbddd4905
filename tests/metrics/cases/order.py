"""What depends on the order of confidences, and kernel estimates."""

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
# Softmax in float32 or float64 moves a confidence over the edge of a cell.
KEPT = {"exact": True}


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


CASES = {
    "AUGRC": _usual(),
    "AURC": _usual(),
    "CoverageAtRisk": _usual(risk=0.5),
    "EqualMassCalibrationError": [
        *_usual(n_bins=7),
        *_usual(n_bins=7, norm="l2")[:1],
        *_usual(n_bins=7, norm="max")[:1],
        *_usual(soft=False, n_bins=7, norm="l2", debias=True)[:1],
    ],
    "ExcessAURC": _usual(soft=False),
    "KernelDensityCalibrationError": _always_kept(bandwidth=0.1),
    "KolmogorovSmirnovCalibrationError": [*_usual(), *_usual(normalized=True)[:1]],
    "KuiperCalibrationError": [*_usual(), *_usual(normalized=True)[:1]],
    "MaximumMeanCalibrationError": _usual(),
    "RiskAtCoverage": _usual(coverage=0.7),
    "SmoothCalibrationError": [*_usual(), *_usual(bandwidth=0.1)[:1]],
    "SweepCalibrationError": _usual(),
}
