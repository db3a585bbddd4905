"""Kernel estimates against all pairs in NumPy and the authors' code."""

import numpy as np
import pytest
import torch
from scipy.stats import beta

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    KernelDensityCalibrationError,
    MaximumMeanCalibrationError,
    kernel_density_calibration_error,
    maximum_mean_calibration_error,
)
from tests.metrics.order_data import CONFIDENCE, CORRECT, TIED, binary, filled, two_classes

ENDS = np.where(np.arange(200) % 5 == 0, 1.0, np.where(np.arange(200) % 5 == 1, 0.0, TIED))


def all_pairs(confidence, correct, bandwidth):
    residual = correct - confidence
    kernel = np.exp(-np.abs(confidence[:, None] - confidence) / bandwidth)
    return np.sqrt(residual @ kernel @ residual) / len(confidence)


@pytest.mark.parametrize("bandwidth", [0.005, 0.1, 0.4, 10.0])
@pytest.mark.parametrize("confidence", [CONFIDENCE, TIED, ENDS])
def test_the_running_sum_is_the_sum_over_all_pairs(confidence, bandwidth):
    found = binary(maximum_mean_calibration_error, confidence, CORRECT, bandwidth=bandwidth)
    assert abs(found - all_pairs(confidence, CORRECT, bandwidth)) < 1e-12


def test_a_million_confidences_take_no_matrix():
    rng = np.random.default_rng(0)
    confidence = rng.random(10**6)
    metric = MaximumMeanCalibrationError(from_logits=False, task="binary", bandwidth=1e3)
    value = filled(metric, confidence, np.ones(10**6)).compute()
    # A kernel this wide is 1 everywhere.
    assert float(value) == pytest.approx((1 - confidence).mean(), rel=1e-3)


def test_netcal():
    """Netcal 1.4.0, MMCE of two columns of probabilities."""
    value = maximum_mean_calibration_error(
        two_classes(CONFIDENCE), torch.tensor(CORRECT), from_logits=False
    )
    assert abs(float(value) - 0.09213247332282357) < 1e-12


def by_density(confidence, correct, bandwidth, p=1):
    """Leave-one-out over all pairs, with SciPy's Beta distribution."""
    kernel = beta.pdf(
        confidence[:, None], confidence / bandwidth + 1, (1 - confidence) / bandwidth + 1
    )
    np.fill_diagonal(kernel, 0)
    density = kernel.sum(1)
    accuracy = np.where(density > 0, kernel @ correct / np.where(density > 0, density, 1), 0)
    return np.mean(np.abs(accuracy - confidence) ** p)


@pytest.mark.parametrize("bandwidth", [0.02, 0.1])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("confidence", [CONFIDENCE, TIED, ENDS])
def test_density_equals_all_pairs(confidence, bandwidth, p):
    found = binary(kernel_density_calibration_error, confidence, CORRECT, bandwidth=bandwidth, p=p)
    assert abs(found - by_density(confidence, CORRECT, bandwidth, p)) < 1e-10


def test_density_of_the_authors():
    """tpopordanoska/ece-kde@d9f60c0, get_ratio_toplabel."""
    for (bandwidth, p), value in {
        (0.1, 1): 0.07896646275135331,
        (0.1, 2): 0.006905524366313107,
        (0.02, 1): 0.09917118241133663,
        (0.02, 2): 0.012004721599845159,
    }.items():
        found = kernel_density_calibration_error(
            two_classes(CONFIDENCE),
            torch.tensor(CORRECT),
            from_logits=False,
            bandwidth=bandwidth,
            p=p,
        )
        assert abs(float(found) - value) < 1e-10


def test_a_far_prediction_takes_the_accuracy_of_the_nearest():
    """In logarithms: the density there is far below the least float64."""
    confidence, correct = np.array([0.1, 0.5, 0.55]), np.array([0, 1, 1])
    found = binary(kernel_density_calibration_error, confidence, correct, bandwidth=1e-5)
    assert found == pytest.approx((0.9 + 0.5 + 0.45) / 3, abs=1e-9)


def test_one_prediction_has_no_other_to_learn_from():
    found = binary(kernel_density_calibration_error, np.array([0.3]), np.array([1]))
    assert found == pytest.approx(0.3)


def test_soft_targets_cannot_be_left_out():
    metric = KernelDensityCalibrationError(from_logits=False, task="binary")
    with pytest.raises(ArgumentError, match="left out"):
        metric.update(torch.tensor([0.3]), torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (MaximumMeanCalibrationError, {"bandwidth": 0.001}),
        (KernelDensityCalibrationError, {"bandwidth": 0.0}),
        (KernelDensityCalibrationError, {"p": 0}),
    ],
)
def test_bad_arguments_are_refused(cls, arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        cls(from_logits=True, **arguments)
