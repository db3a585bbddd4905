"""Tracked quantities as torchmetrics, with functional twins."""

from lightning_reg.metrics.calibration import (
    CalibrationError,
    ReliabilityBins,
    calibration_error,
)
from lightning_reg.metrics.entropy import PredictiveEntropy, predictive_entropy
from lightning_reg.metrics.likelihood import (
    ExpectedAccuracy,
    NegativeLogLikelihood,
    expected_accuracy,
    negative_log_likelihood,
)
from lightning_reg.metrics.reliability import draw_reliability

__all__ = [
    "CalibrationError",
    "ExpectedAccuracy",
    "NegativeLogLikelihood",
    "PredictiveEntropy",
    "ReliabilityBins",
    "calibration_error",
    "draw_reliability",
    "expected_accuracy",
    "negative_log_likelihood",
    "predictive_entropy",
]
