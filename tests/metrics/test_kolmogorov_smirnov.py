"""Cumulative differences against NumPy, the authors' code, and closed forms."""

import numpy as np
import pytest

from lightning_reg.metrics import (
    KolmogorovSmirnovCalibrationError,
    KuiperCalibrationError,
    kolmogorov_smirnov_calibration_error,
    kuiper_calibration_error,
)
from tests.metrics.order_data import CONFIDENCE, CORRECT, TIED, binary, filled


def cumulative(confidence, correct):
    """The difference at the ends of groups of equal confidence."""
    order = np.argsort(confidence, kind="stable")
    confidence, correct = confidence[order], correct[order]
    ends = np.r_[np.diff(confidence) > 0, True]
    return np.r_[0, (np.cumsum(correct - confidence) / len(correct))[ends]]


@pytest.mark.parametrize("confidence", [CONFIDENCE, TIED, 1 - CONFIDENCE])
def test_equals_numpy(confidence):
    difference = cumulative(confidence, CORRECT)
    found = binary(kolmogorov_smirnov_calibration_error, confidence, CORRECT)
    assert abs(found - np.abs(difference).max()) < 1e-12
    found = binary(kuiper_calibration_error, confidence, CORRECT)
    assert abs(found - np.ptp(difference)) < 1e-12


def test_the_authors_code():
    """Splines: spline-calibration@b6a2f60 KS.py; Kuiper: ecevecce@ddbd99a calibration.py."""
    found = binary(kolmogorov_smirnov_calibration_error, CONFIDENCE, CORRECT)
    assert abs(found - 0.10707307938879285) < 1e-12
    found = binary(kuiper_calibration_error, CONFIDENCE, CORRECT)
    assert abs(found - 0.10901693124841878) < 1e-12
    # Its third result is the standard deviation under calibration.
    found = binary(kuiper_calibration_error, CONFIDENCE, CORRECT, normalized=True)
    assert abs(found - 0.10901693124841878 / 0.028823509662298276) < 1e-10


def test_the_order_of_tied_samples_changes_nothing():
    for function in (kolmogorov_smirnov_calibration_error, kuiper_calibration_error):
        wanted = binary(function, TIED, CORRECT)
        for order in (np.argsort(CORRECT), np.argsort(-CORRECT)):
            assert abs(binary(function, TIED[order], CORRECT[order]) - wanted) < 1e-13


def test_over_and_underconfidence_add_up_in_kuiper_only():
    confidence = np.repeat([0.2, 0.8], 100)
    correct = np.r_[np.zeros(60), np.ones(40), np.zeros(40), np.ones(60)]
    # Underconfident by 0.2 on one half, overconfident by 0.2 on the other.
    assert binary(kolmogorov_smirnov_calibration_error, confidence, correct) == pytest.approx(0.1)
    assert binary(kuiper_calibration_error, confidence, correct) == pytest.approx(0.1)
    # Three ranges, up, down, up: Kuiper sees the fall from the top.
    confidence = np.repeat([0.1, 0.5, 0.9], 100)
    correct = np.r_[np.arange(100) < 20, np.arange(100) < 20, np.ones(100)].astype(float)
    ends = np.array([0, 10, -20, -10]) / 300
    found = binary(kolmogorov_smirnov_calibration_error, confidence, correct)
    assert found == pytest.approx(np.abs(ends).max())
    assert binary(kuiper_calibration_error, confidence, correct) == pytest.approx(np.ptp(ends))


def test_kuiper_is_the_same_from_either_end():
    wanted = binary(kuiper_calibration_error, CONFIDENCE, CORRECT)
    assert binary(kuiper_calibration_error, 1 - CONFIDENCE, 1 - CORRECT) == pytest.approx(wanted)


@pytest.mark.parametrize("cls", [KolmogorovSmirnovCalibrationError, KuiperCalibrationError])
def test_the_difference_is_drawn_from_the_state(cls):
    metric = filled(cls(from_logits=False, task="binary"), TIED, CORRECT)
    _, axes = metric.plot()
    drawn = axes.lines[1].get_ydata()
    np.testing.assert_allclose(drawn, cumulative(TIED, CORRECT), atol=1e-12)
