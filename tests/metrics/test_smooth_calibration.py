"""The smooth calibration error against quadrature of the reflected kernel, and relplot."""

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import SmoothCalibrationError, smooth_calibration_error
from tests.metrics.order_data import CONFIDENCE, CORRECT, binary, filled

ENDS = np.where(np.arange(200) % 3 == 2, 1.0, CONFIDENCE)
BOTH = np.where(np.arange(200) % 3 == 0, 0.0, ENDS)


def smoothed(confidence, residual, bandwidth):
    """The reflected Gaussian, as the sum of its images."""
    shift = 2 * np.arange(-3, 4)[:, None]

    def at(t):
        images = [np.exp(-((t - s * confidence + shift) ** 2) / 2 / bandwidth**2) for s in (1, -1)]
        kernel = sum(images).sum(0) / (bandwidth * np.sqrt(2 * np.pi))
        return (kernel * residual).mean()

    return at


def by_quadrature(confidence, correct, bandwidth):
    function = smoothed(confidence, correct - confidence, bandwidth)
    mesh = np.linspace(0, 1, 501)
    values = np.array([function(t) for t in mesh])
    crossed = np.flatnonzero(values[1:] * values[:-1] < 0)
    zeros = [brentq(function, mesh[i], mesh[i + 1], xtol=1e-15) for i in crossed]
    ends = [0, *zeros, 1]
    return sum(
        abs(quad(function, a, b, epsabs=1e-13, epsrel=1e-11, limit=200)[0])
        for a, b in itertools.pairwise(ends)
    )


@pytest.mark.parametrize("bandwidth", [0.5, 0.1, 0.03])
@pytest.mark.parametrize("confidence", [CONFIDENCE, ENDS, BOTH])
def test_equals_the_integral(confidence, bandwidth):
    found = binary(smooth_calibration_error, confidence, CORRECT, bandwidth=bandwidth)
    assert abs(found - by_quadrature(confidence, CORRECT, bandwidth)) < 1e-11


@pytest.mark.parametrize("confidence", [CONFIDENCE, ENDS, BOTH])
def test_the_bandwidth_is_the_fixed_point(confidence):
    value = binary(smooth_calibration_error, confidence, CORRECT)
    at_value = binary(smooth_calibration_error, confidence, CORRECT, bandwidth=value)
    assert abs(at_value - value) < 1e-12


def test_it_does_not_grow_with_the_bandwidth():
    widths = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    values = [binary(smooth_calibration_error, BOTH, CORRECT, bandwidth=w) for w in widths]
    assert all(a >= b - 1e-14 for a, b in itertools.pairwise(values))
    # In the limit of a flat kernel only the mean residual is left.
    assert values[-1] == pytest.approx(abs((CORRECT - BOTH).mean()), abs=1e-3)


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("bandwidth", [None, 0.01, 0.3])
def test_mass_at_exactly_zero_and_one_keeps_its_weight(end, bandwidth):
    inside = abs(end - 0.02)
    correct = np.r_[np.full(30, 1 - end), np.full(70, end)]
    at_end = binary(smooth_calibration_error, np.full(100, end), correct, bandwidth=bandwidth)
    assert at_end == pytest.approx(0.3, abs=1e-12)
    # Half of the predictions a little inside: the others do not count for less.
    mixed = np.where(np.arange(100) % 2 == 0, end, inside)
    expected = abs((correct - mixed).mean())
    found = binary(smooth_calibration_error, mixed, correct, bandwidth=bandwidth)
    assert found == pytest.approx(expected, abs=1e-3)


def test_relplot():
    """Relplot 1.0.3 (apple/ml-calibration@18ff21a), to its grid and its eps in the density."""
    for bandwidth, value in {
        0.2: 0.10606952551165624,
        0.1: 0.10588407695982821,
        0.05: 0.10580569787480718,
        0.02: 0.10602454644918187,
    }.items():
        found = binary(smooth_calibration_error, CONFIDENCE, CORRECT, bandwidth=bandwidth)
        assert found == pytest.approx(value, abs=6e-4)
    found = binary(smooth_calibration_error, CONFIDENCE, CORRECT)
    assert found == pytest.approx(0.10589743431681586, abs=1e-3)


def test_relplot_halves_the_mass_at_one():
    """Relplot 1.0.3 at bandwidth 0.1 with a third of the predictions at 1: 0.1562."""
    ours = binary(smooth_calibration_error, ENDS, CORRECT, bandwidth=0.1)
    assert ours == pytest.approx(by_quadrature(ENDS, CORRECT, 0.1), abs=1e-11)
    at_one = ENDS == 1
    weight = np.where(at_one, 0.5, 1.0)
    halved = abs((weight * (CORRECT - ENDS)).sum()) / weight.sum()
    assert halved == pytest.approx(0.15618758101088814, abs=5e-3)
    assert ours > halved + 0.01


def test_a_calibrated_model_has_its_error_read_at_the_least_bandwidth():
    confidence, correct = np.full(10, 0.5), np.r_[np.ones(5), np.zeros(5)]
    assert binary(smooth_calibration_error, confidence, correct) == pytest.approx(0, abs=1e-12)
    off = np.r_[np.ones(501), np.zeros(499)]
    found = binary(smooth_calibration_error, np.full(1000, 0.5), off, min_bandwidth=0.01)
    assert found == pytest.approx(0.001, abs=1e-12)


def test_the_curve_is_the_kernel_mean():
    metric = SmoothCalibrationError(from_logits=False, task="binary", exact=True, bandwidth=0.1)
    curve = filled(metric, BOTH, CORRECT).curve()
    for i in (0, 64, 200, 256):
        t = i / 256
        density = smoothed(BOTH, np.ones(200), 0.1)(t)
        assert float(curve.confidence[i]) == t
        assert float(curve.density[i]) == pytest.approx(density, abs=1e-11)
        accuracy = smoothed(BOTH, CORRECT, 0.1)(t) / density
        assert float(curve.accuracy[i]) == pytest.approx(accuracy, abs=1e-9)


def test_the_curve_is_nan_where_no_prediction_is_near():
    metric = SmoothCalibrationError(from_logits=False, task="binary", bandwidth=0.01)
    curve = filled(metric, np.array([0.2, 0.2, 0.21]), np.array([0, 1, 1])).curve()
    near = (curve.confidence - 0.2).abs() < 0.03
    assert torch.isfinite(curve.accuracy[near]).all()
    assert torch.isnan(curve.accuracy[curve.confidence > 0.5]).all()


def test_the_drawn_number_is_the_logged_one():
    metric = filled(SmoothCalibrationError(from_logits=False, task="binary"), BOTH, CORRECT)
    _, axes = metric.plot()
    assert f"smECE {float(metric.compute()):.4f}" in axes.texts[0].get_text()


def test_nothing_counted_has_no_curve():
    with pytest.raises(ArgumentError, match="nothing to draw"):
        SmoothCalibrationError(from_logits=True).curve()


@pytest.mark.parametrize("arguments", [{"bandwidth": 0.0}, {"min_bandwidth": 1e-4}])
def test_bandwidths_outside_their_range_are_refused(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        SmoothCalibrationError(from_logits=True, **arguments)
