"""Tracked quantities as torchmetrics, with functional twins."""

from lightning_reg.metrics.calibration import (
    CalibrationError,
    ReliabilityBins,
    calibration_error,
)
from lightning_reg.metrics.entropy import PredictiveEntropy, predictive_entropy
from lightning_reg.metrics.hessian import (
    hessian_eigenvalues,
    hessian_spectrum,
    hessian_trace,
)
from lightning_reg.metrics.likelihood import ExpectedAccuracy, NegativeLogLikelihood
from lightning_reg.metrics.reliability import draw_reliability
from lightning_reg.metrics.sharpness import HessianTopEigenvalue, HessianTrace

__all__ = [
    "CalibrationError",
    "ExpectedAccuracy",
    "HessianTopEigenvalue",
    "HessianTrace",
    "NegativeLogLikelihood",
    "PredictiveEntropy",
    "ReliabilityBins",
    "calibration_error",
    "draw_reliability",
    "hessian_eigenvalues",
    "hessian_spectrum",
    "hessian_trace",
    "predictive_entropy",
]
