"""Tracked quantities as torchmetrics, with functional twins."""

from lightning_reg.metrics.attention_entropy import (
    AttentionEntropy,
    attention_entropy,
    draw_attention_entropy,
)
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
from lightning_reg.metrics.class_entropy import (
    ClassEntropy,
    MarginalEntropy,
    class_entropy,
    marginal_entropy,
)
from lightning_reg.metrics.confidence_bias import (
    OverconfidenceError,
    UnderconfidenceError,
    overconfidence_error,
    underconfidence_error,
)
from lightning_reg.metrics.conservation import (
    ConservationError,
    conservation_error,
)
from lightning_reg.metrics.entropy import (
    PredictiveEntropy,
    predictive_entropy,
)
from lightning_reg.metrics.entropy_separation import (
    EntropyHistogram,
    EntropySeparation,
    draw_entropies,
    entropy_separation,
)
from lightning_reg.metrics.equal_mass import (
    EqualMassCalibrationError,
    SweepCalibrationError,
    equal_mass_calibration_error,
    sweep_calibration_error,
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
from lightning_reg.metrics.hessian import (
    hessian_eigenvalues,
    hessian_spectrum,
    hessian_trace,
)
from lightning_reg.metrics.hessian_estimates import (
    HessianTopEigenvalue,
    HessianTrace,
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
from lightning_reg.metrics.language import (
    BitsPerByte,
    Perplexity,
    bits_per_byte,
    perplexity,
)
from lightning_reg.metrics.likelihood import (
    ExpectedAccuracy,
    NegativeLogLikelihood,
    expected_accuracy,
    negative_log_likelihood,
)
from lightning_reg.metrics.margin import (
    ProbabilityMargin,
    probability_margin,
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
from lightning_reg.metrics.opis import (
    OperatingPointInconsistency,
    operating_point_inconsistency,
)
from lightning_reg.metrics.pit import (
    PITHistogram,
    pit_discrepancy,
)
from lightning_reg.metrics.quantiles import (
    QuantileCalibrationError,
    quantile_calibration_error,
)
from lightning_reg.metrics.regression_calibration import (
    ExpectedNormalizedCalibrationError,
    UncertaintyBins,
    UncertaintyCalibrationError,
    expected_normalized_calibration_error,
    uncertainty_calibration_error,
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
from lightning_reg.metrics.utilization import (
    Utilization,
    utilization,
)

__all__ = [
    "AUGRC",
    "AURC",
    "AttentionEntropy",
    "AverageCalibrationError",
    "BitsPerByte",
    "BrierDecomposition",
    "BrierScore",
    "ByGroup",
    "CalibrationError",
    "CalibrationSuite",
    "CalibrationUncertainty",
    "ClassEntropy",
    "ConditionalEntropy",
    "ConservationError",
    "CoverageAtRisk",
    "EnsembleEntropy",
    "EntropyHistogram",
    "EntropySeparation",
    "EqualMassCalibrationError",
    "ExcessAURC",
    "ExpectedAccuracy",
    "ExpectedEntropy",
    "ExpectedNormalizedCalibrationError",
    "ExpertLoadEntropy",
    "FunctionalEntropy",
    "FunctionalFisherInformation",
    "GaussianCRPS",
    "GaussianNLL",
    "HessianTopEigenvalue",
    "HessianTrace",
    "HighEntropyShare",
    "IntervalCoverage",
    "IntervalWidth",
    "KernelDensityCalibrationError",
    "KolmogorovSmirnovCalibrationError",
    "KuiperCalibrationError",
    "LabelInformation",
    "MarginalEntropy",
    "MaximumMeanCalibrationError",
    "MutualInformation",
    "NegativeLogLikelihood",
    "OperatingPointInconsistency",
    "OverconfidenceError",
    "PITHistogram",
    "Perplexity",
    "PredictiveEntropy",
    "ProbabilityMargin",
    "QuantileCalibrationError",
    "ReliabilityBins",
    "RiskAtCoverage",
    "RollingEntropy",
    "RouterEntropy",
    "RoutingInformation",
    "Sharpness",
    "SmoothCalibrationError",
    "SquaredKernelCalibrationError",
    "SweepCalibrationError",
    "UncertaintyBins",
    "UncertaintyCalibrationError",
    "UnderconfidenceError",
    "Utilization",
    "VariationRatio",
    "attention_entropy",
    "augrc",
    "aurc",
    "average_calibration_error",
    "bits_per_byte",
    "brier_decomposition",
    "brier_score",
    "by_group",
    "calibration_error",
    "calibration_suite",
    "calibration_uncertainty",
    "class_entropy",
    "conditional_entropy",
    "conservation_error",
    "coverage_at_risk",
    "draw_attention_entropy",
    "draw_entropies",
    "draw_reliability",
    "ensemble_entropy",
    "entropy_separation",
    "equal_mass_calibration_error",
    "excess_aurc",
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
    "hessian_eigenvalues",
    "hessian_spectrum",
    "hessian_trace",
    "high_entropy_share",
    "interval_coverage",
    "interval_width",
    "kernel_density_calibration_error",
    "kolmogorov_smirnov_calibration_error",
    "kuiper_calibration_error",
    "label_information",
    "marginal_entropy",
    "maximum_mean_calibration_error",
    "mutual_information",
    "negative_log_likelihood",
    "operating_point_inconsistency",
    "overconfidence_error",
    "perplexity",
    "perturbed_cross_entropy",
    "pit_discrepancy",
    "predictive_entropy",
    "probability_margin",
    "quantile_calibration_error",
    "risk_at_coverage",
    "rolling_entropy",
    "router_entropy",
    "routing_information",
    "sharpness",
    "smooth_calibration_error",
    "squared_kernel_calibration_error",
    "sweep_calibration_error",
    "uncertainty_calibration_error",
    "underconfidence_error",
    "utilization",
    "variation_ratio",
]
