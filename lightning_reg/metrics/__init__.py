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
from lightning_reg.metrics.attention_entropy import (
    AttentionEntropy,
    attention_entropy,
    draw_attention_entropy,
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
from lightning_reg.metrics.class_entropy import (
    ClassEntropy,
    MarginalEntropy,
    class_entropy,
    marginal_entropy,
)
from lightning_reg.metrics.entropy import PredictiveEntropy, predictive_entropy
from lightning_reg.metrics.entropy_separation import (
    EntropyHistogram,
    EntropySeparation,
    draw_entropies,
    entropy_separation,
)
from lightning_reg.metrics.functional_entropy import (
    FunctionalEntropy,
    FunctionalFisherInformation,
    functional_entropy,
    functional_fisher_information,
    perturbed_cross_entropy,
)
from lightning_reg.metrics.gaussian_scores import (
    GaussianCRPS,
    GaussianNLL,
    Sharpness,
    gaussian_crps,
    gaussian_nll,
    sharpness,
)
from lightning_reg.metrics.information import (
    ConditionalEntropy,
    LabelInformation,
    conditional_entropy,
    label_information,
)
from lightning_reg.metrics.intervals import (
    IntervalCoverage,
    IntervalWidth,
    gaussian_interval,
    gaussian_quantiles,
    interval_coverage,
    interval_width,
)
from lightning_reg.metrics.language import BitsPerByte, Perplexity, bits_per_byte, perplexity
from lightning_reg.metrics.likelihood import (
    ExpectedAccuracy,
    NegativeLogLikelihood,
    expected_accuracy,
    negative_log_likelihood,
)
from lightning_reg.metrics.members import (
    EnsembleEntropy,
    ExpectedEntropy,
    MutualInformation,
    VariationRatio,
    ensemble_entropy,
    expected_entropy,
    mutual_information,
    variation_ratio,
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
from lightning_reg.metrics.uncertainty import CalibrationUncertainty, calibration_uncertainty

__all__ = [
    "AverageCalibrationError",
    "BrierDecomposition",
    "BrierScore",
from lightning_reg.metrics.rolling_entropy import (
    HighEntropyShare,
    RollingEntropy,
    high_entropy_share,
    rolling_entropy,
)
from lightning_reg.metrics.routing import (
    ExpertLoadEntropy,
    RouterEntropy,
    RoutingInformation,
    expert_load_entropy,
    router_entropy,
    routing_information,
)

__all__ = [
    "AttentionEntropy",
    "BitsPerByte",
    "CalibrationError",
    "CalibrationSuite",
    "CalibrationUncertainty",
    "ClassEntropy",
    "ConditionalEntropy",
    "EnsembleEntropy",
    "EntropyHistogram",
    "EntropySeparation",
    "ExpectedAccuracy",
    "ExpectedEntropy",
    "ExpectedNormalizedCalibrationError",
    "ExpertLoadEntropy",
    "FunctionalEntropy",
    "FunctionalFisherInformation",
    "GaussianCRPS",
    "GaussianNLL",
    "HighEntropyShare",
    "IntervalCoverage",
    "IntervalWidth",
    "LabelInformation",
    "MarginalEntropy",
    "MutualInformation",
    "NegativeLogLikelihood",
    "OverconfidenceError",
    "PITHistogram",
    "Perplexity",
    "PredictiveEntropy",
    "QuantileCalibrationError",
    "ReliabilityBins",
    "UnderconfidenceError",
    "average_calibration_error",
    "brier_decomposition",
    "brier_score",
    "RollingEntropy",
    "RouterEntropy",
    "RoutingInformation",
    "Sharpness",
    "UncertaintyBins",
    "UncertaintyCalibrationError",
    "VariationRatio",
    "attention_entropy",
    "bits_per_byte",
    "calibration_error",
    "calibration_suite",
    "calibration_uncertainty",
    "class_entropy",
    "conditional_entropy",
    "draw_attention_entropy",
    "draw_entropies",
    "draw_reliability",
    "ensemble_entropy",
    "entropy_separation",
    "expected_accuracy",
    "expected_entropy",
    "expected_normalized_calibration_error",
    "expert_load_entropy",
    "functional_entropy",
    "functional_fisher_information",
    "gaussian_crps",
    "gaussian_interval",
    "gaussian_nll",
    "gaussian_quantiles",
    "high_entropy_share",
    "interval_coverage",
    "interval_width",
    "label_information",
    "marginal_entropy",
    "mutual_information",
    "negative_log_likelihood",
    "overconfidence_error",
    "predictive_entropy",
    "underconfidence_error",
    "perplexity",
    "perturbed_cross_entropy",
    "pit_discrepancy",
    "predictive_entropy",
    "quantile_calibration_error",
    "rolling_entropy",
    "router_entropy",
    "routing_information",
    "sharpness",
    "uncertainty_calibration_error",
    "variation_ratio",
]
