"""Tracked quantities as torchmetrics, with functional twins."""

from lightning_reg.metrics.average_calibration import (
    AverageCalibrationError,
    average_calibration_error,
)
from lightning_reg.metrics.brier import (
    BrierDecomposition,
    BrierScore,
    brier_decomposition,
    brier_score,
)
from lightning_reg.metrics.calibration import (
    CalibrationError,
    ReliabilityBins,
    calibration_error,
)
from lightning_reg.metrics.calibration_suite import CalibrationSuite, calibration_suite
from lightning_reg.metrics.confidence_bias import (
    OverconfidenceError,
    UnderconfidenceError,
    overconfidence_error,
    underconfidence_error,
)
from lightning_reg.metrics.entropy import PredictiveEntropy, predictive_entropy
from lightning_reg.metrics.likelihood import (
    ExpectedAccuracy,
    NegativeLogLikelihood,
    expected_accuracy,
    negative_log_likelihood,
)
from lightning_reg.metrics.reliability import draw_reliability
from lightning_reg.metrics.uncertainty import CalibrationUncertainty, calibration_uncertainty

__all__ = [
    "AverageCalibrationError",
    "BrierDecomposition",
    "BrierScore",
    "CalibrationError",
    "CalibrationSuite",
    "CalibrationUncertainty",
    "ExpectedAccuracy",
    "NegativeLogLikelihood",
    "OverconfidenceError",
    "PredictiveEntropy",
    "ReliabilityBins",
    "UnderconfidenceError",
    "average_calibration_error",
    "brier_decomposition",
    "brier_score",
    "calibration_error",
    "calibration_suite",
    "calibration_uncertainty",
    "draw_reliability",
    "expected_accuracy",
    "negative_log_likelihood",
    "overconfidence_error",
    "predictive_entropy",
    "underconfidence_error",
]
