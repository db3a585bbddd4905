"""Tracked quantities as torchmetrics, with functional twins."""

from lightning_reg.metrics.calibration import (
    CalibrationError,
    ReliabilityBins,
    calibration_error,
)
from lightning_reg.metrics.entropy import PredictiveEntropy, predictive_entropy
from lightning_reg.metrics.gaussian_scores import (
    GaussianCRPS,
    GaussianNLL,
    Sharpness,
    gaussian_crps,
    gaussian_nll,
    sharpness,
)
from lightning_reg.metrics.intervals import (
    IntervalCoverage,
    IntervalWidth,
    gaussian_interval,
    gaussian_quantiles,
    interval_coverage,
    interval_width,
)
from lightning_reg.metrics.likelihood import (
    ExpectedAccuracy,
    NegativeLogLikelihood,
    expected_accuracy,
    negative_log_likelihood,
)
from lightning_reg.metrics.pit import PITHistogram, pit_discrepancy
from lightning_reg.metrics.quantiles import QuantileCalibrationError, quantile_calibration_error
from lightning_reg.metrics.regression_calibration import (
    ExpectedNormalizedCalibrationError,
    UncertaintyBins,
    UncertaintyCalibrationError,
    expected_normalized_calibration_error,
    uncertainty_calibration_error,
)
from lightning_reg.metrics.reliability import draw_reliability

__all__ = [
    "CalibrationError",
    "ExpectedAccuracy",
    "ExpectedNormalizedCalibrationError",
    "GaussianCRPS",
    "GaussianNLL",
    "IntervalCoverage",
    "IntervalWidth",
    "NegativeLogLikelihood",
    "PITHistogram",
    "PredictiveEntropy",
    "QuantileCalibrationError",
    "ReliabilityBins",
    "Sharpness",
    "UncertaintyBins",
    "UncertaintyCalibrationError",
    "calibration_error",
    "draw_reliability",
    "expected_accuracy",
    "expected_normalized_calibration_error",
    "gaussian_crps",
    "gaussian_interval",
    "gaussian_nll",
    "gaussian_quantiles",
    "interval_coverage",
    "interval_width",
    "negative_log_likelihood",
    "pit_discrepancy",
    "predictive_entropy",
    "quantile_calibration_error",
    "sharpness",
    "uncertainty_calibration_error",
]
