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
from lightning_reg.metrics.by_group import (
    ByGroup,
    by_group,
)
from lightning_reg.metrics.calibration import (
    CalibrationError,
    ReliabilityBins,
    calibration_error,
)
from lightning_reg.metrics.calibration_suite import (
    CalibrationSuite,
    calibration_suite,
)
from lightning_reg.metrics.confidence_bias import (
    OverconfidenceError,
    UnderconfidenceError,
    overconfidence_error,
    underconfidence_error,
)
from lightning_reg.metrics.entropy import (
    PredictiveEntropy,
    predictive_entropy,
)
from lightning_reg.metrics.equal_mass import (
    EqualMassCalibrationError,
    SweepCalibrationError,
    equal_mass_calibration_error,
    sweep_calibration_error,
)
from lightning_reg.metrics.kernel_calibration import (
    KernelDensityCalibrationError,
    MaximumMeanCalibrationError,
    kernel_density_calibration_error,
    maximum_mean_calibration_error,
)
from lightning_reg.metrics.kolmogorov_smirnov import (
    KolmogorovSmirnovCalibrationError,
    KuiperCalibrationError,
    kolmogorov_smirnov_calibration_error,
    kuiper_calibration_error,
)
from lightning_reg.metrics.likelihood import (
    ExpectedAccuracy,
    NegativeLogLikelihood,
    expected_accuracy,
    negative_log_likelihood,
)
from lightning_reg.metrics.opis import (
    OperatingPointInconsistency,
    operating_point_inconsistency,
)
from lightning_reg.metrics.reliability import (
    draw_reliability,
)
from lightning_reg.metrics.risk_coverage import (
    CoverageAtRisk,
    RiskAtCoverage,
    coverage_at_risk,
    risk_at_coverage,
)
from lightning_reg.metrics.selective import (
    AUGRC,
    AURC,
    ExcessAURC,
    augrc,
    aurc,
    excess_aurc,
)
from lightning_reg.metrics.smooth_calibration import (
    SmoothCalibrationError,
    smooth_calibration_error,
)
from lightning_reg.metrics.squared_kernel import (
    SquaredKernelCalibrationError,
    squared_kernel_calibration_error,
)
from lightning_reg.metrics.uncertainty import (
    CalibrationUncertainty,
    calibration_uncertainty,
)

__all__ = [
    "AUGRC",
    "AURC",
    "AverageCalibrationError",
    "BrierDecomposition",
    "BrierScore",
    "ByGroup",
    "CalibrationError",
    "CalibrationSuite",
    "CalibrationUncertainty",
    "CoverageAtRisk",
    "EqualMassCalibrationError",
    "ExcessAURC",
    "ExpectedAccuracy",
    "KernelDensityCalibrationError",
    "KolmogorovSmirnovCalibrationError",
    "KuiperCalibrationError",
    "MaximumMeanCalibrationError",
    "NegativeLogLikelihood",
    "OperatingPointInconsistency",
    "OverconfidenceError",
    "PredictiveEntropy",
    "ReliabilityBins",
    "RiskAtCoverage",
    "SmoothCalibrationError",
    "SquaredKernelCalibrationError",
    "SweepCalibrationError",
    "UnderconfidenceError",
    "augrc",
    "aurc",
    "average_calibration_error",
    "brier_decomposition",
    "brier_score",
    "by_group",
    "calibration_error",
    "calibration_suite",
    "calibration_uncertainty",
    "coverage_at_risk",
    "draw_reliability",
    "equal_mass_calibration_error",
    "excess_aurc",
    "expected_accuracy",
    "kernel_density_calibration_error",
    "kolmogorov_smirnov_calibration_error",
    "kuiper_calibration_error",
    "maximum_mean_calibration_error",
    "negative_log_likelihood",
    "operating_point_inconsistency",
    "overconfidence_error",
    "predictive_entropy",
    "risk_at_coverage",
    "smooth_calibration_error",
    "squared_kernel_calibration_error",
    "sweep_calibration_error",
    "underconfidence_error",
]
