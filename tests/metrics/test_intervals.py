"""Coverage and width of intervals, and the calibration of quantiles."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics import MetricCollection

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    IntervalCoverage,
    IntervalWidth,
    QuantileCalibrationError,
    gaussian_interval,
    gaussian_quantiles,
    quantile_calibration_error,
)

_rng = np.random.default_rng(1)
MEAN, STD = _rng.normal(size=500), _rng.uniform(0.5, 2, 500)
TARGET = MEAN + STD * _rng.normal(size=500) * 1.4 + 0.2
GIVEN = tuple(torch.tensor(v) for v in (MEAN, STD, TARGET))
LEVELS = np.linspace(0.05, 0.95, 19)


def quantiles():
    return gaussian_quantiles(GIVEN[0], GIVEN[1], torch.tensor(LEVELS), scale_is="std")


def test_gaussian_quantiles_are_scipy_s():
    expected = stats.norm.ppf(LEVELS[None], MEAN[:, None], STD[:, None])
    np.testing.assert_allclose(quantiles().numpy(), expected, atol=1e-9)
    variance = gaussian_quantiles(
        GIVEN[0], GIVEN[1] ** 2, torch.tensor(LEVELS), scale_is="variance"
    )
    torch.testing.assert_close(variance, quantiles(), atol=1e-12, rtol=0)


def test_coverage_and_width_of_a_gaussian_interval():
    lower, upper = gaussian_interval(GIVEN[0], GIVEN[1], level=0.8, scale_is="std")
    z = stats.norm.ppf(0.9)
    inside = np.abs((TARGET - MEAN) / STD) <= z
    metrics = MetricCollection([IntervalCoverage(), IntervalWidth()])
    metrics.update(lower, upper, GIVEN[2])
    values = metrics.compute()
    assert float(values["IntervalCoverage"]) == pytest.approx(inside.mean(), abs=1e-12)
    assert float(values["IntervalWidth"]) == pytest.approx((2 * z * STD).mean(), abs=1e-9)
    assert len(metrics.compute_groups) == 1


def test_both_ends_belong_to_an_interval():
    metric = IntervalCoverage()
    metric.update(torch.zeros(3), torch.ones(3), torch.tensor([0.0, 1.0, 1.5]))
    assert float(metric.compute()) == pytest.approx(2 / 3)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_quantile_calibration_equals_numpy(norm):
    shares = np.array([(stats.norm.ppf(q, MEAN, STD) >= TARGET).mean() for q in LEVELS])
    gaps = np.abs(shares - LEVELS)
    expected = {"l1": gaps.mean(), "l2": np.sqrt((gaps**2).mean()), "max": gaps.max()}[norm]
    value = quantile_calibration_error(quantiles(), GIVEN[2], levels=LEVELS, norm=norm)
    assert float(value) == pytest.approx(expected, abs=1e-12)


def test_a_bias_that_central_intervals_do_not_see_is_seen():
    # Every target lies on one side of its median, and the central half holds half of them.
    mean, std = torch.zeros(4).double(), torch.ones(4).double()
    target = torch.tensor([0.1, 0.2, 2.0, 3.0]).double()
    lower, upper = gaussian_interval(mean, std, level=0.5, scale_is="std")
    assert float(((lower <= target) & (target <= upper)).double().mean()) == 0.5
    rows = gaussian_quantiles(mean, std, torch.tensor([0.25, 0.5, 0.75]), scale_is="std")
    value = quantile_calibration_error(rows, target, levels=[0.25, 0.5, 0.75])
    assert float(value) == pytest.approx((0.25 + 0.5 + 0.25) / 3, abs=1e-12)


def test_dense_quantiles_keep_their_levels_last():
    rows = quantiles()
    dense = quantile_calibration_error(
        rows.view(5, 10, 10, 19), GIVEN[2].view(5, 10, 10), levels=LEVELS
    )
    flat = quantile_calibration_error(rows, GIVEN[2], levels=LEVELS)
    assert float(dense) == float(flat)


def test_the_order_of_levels_makes_no_difference():
    flipped = quantile_calibration_error(quantiles().flip(1), GIVEN[2], levels=LEVELS[::-1])
    straight = quantile_calibration_error(quantiles(), GIVEN[2], levels=LEVELS)
    assert float(flipped) == pytest.approx(float(straight), abs=1e-12)


def test_the_figure_shows_the_observed_shares():
    metric = QuantileCalibrationError(levels=LEVELS)
    metric.update(quantiles(), GIVEN[2])
    _, axes = metric.plot()
    assert axes.lines[0].get_ydata() == pytest.approx(metric.shares().tolist())


@pytest.mark.parametrize("levels", [[], [0.0, 0.5], [0.5, 1.0], [0.5, float("nan")]])
def test_levels_outside_the_unit_interval_are_refused(levels):
    with pytest.raises(ArgumentError, match="levels"):
        QuantileCalibrationError(levels=levels)


def test_bad_calls_of_the_helpers_are_refused():
    one = torch.ones(2)
    with pytest.raises(ArgumentError, match="scale_is"):
        gaussian_quantiles(one, one, torch.tensor([0.5]), scale_is="sd")
    with pytest.raises(ArgumentError, match="levels"):
        gaussian_quantiles(one, one, torch.tensor([1.0]), scale_is="std")
    with pytest.raises(ArgumentError, match="level"):
        gaussian_interval(one, one, level=1.0, scale_is="std")
