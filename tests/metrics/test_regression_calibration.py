"""ENCE, UCE and the probability integral transform against NumPy and SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics import MetricCollection

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    ExpectedNormalizedCalibrationError,
    PITHistogram,
    UncertaintyCalibrationError,
    expected_normalized_calibration_error,
    pit_discrepancy,
    uncertainty_calibration_error,
)

_rng = np.random.default_rng(2)
N, BINS = 600, 6
# Six clear groups of 100: wherever a rule of equal mass cuts, it cuts between them.
VARIANCE = _rng.permutation(
    np.concatenate([10.0**k * _rng.uniform(1, 1.02, 100) for k in range(-3, 3)])
)
MEAN = _rng.normal(size=N)
TARGET = MEAN + np.sqrt(VARIANCE) * 1.3 * _rng.normal(size=N)
GIVEN = (torch.tensor(MEAN), torch.tensor(VARIANCE), torch.tensor(TARGET))


def textbook(groups):
    error = (TARGET - MEAN) ** 2
    rmv = np.array([np.sqrt(VARIANCE[g].mean()) for g in groups])
    rmse = np.array([np.sqrt(error[g].mean()) for g in groups])
    share = np.array([len(g) / N for g in groups])
    return (np.abs(rmv - rmse) / rmv).mean(), (share * np.abs(rmse**2 - rmv**2)).sum()


def test_equal_mass_bins_are_those_of_a_sort():
    ence, uce = textbook(np.array_split(np.argsort(VARIANCE), BINS))
    args = {"scale_is": "variance", "n_bins": BINS}
    assert float(expected_normalized_calibration_error(*GIVEN, **args)) == pytest.approx(
        ence, abs=1e-9
    )
    assert float(uncertainty_calibration_error(*GIVEN, **args)) == pytest.approx(uce, abs=1e-9)


def test_equal_width_bins_are_those_of_a_histogram():
    limits, bins = (0.0, 120.0), 5
    place = np.minimum((VARIANCE / 120 * bins).astype(int), bins - 1)
    groups = [np.flatnonzero(place == b) for b in range(bins) if (place == b).any()]
    ence, uce = textbook(groups)
    args = {"scale_is": "variance", "n_bins": bins, "limits": limits}
    assert float(expected_normalized_calibration_error(*GIVEN, **args)) == pytest.approx(
        ence, abs=1e-9
    )
    assert float(uncertainty_calibration_error(*GIVEN, **args)) == pytest.approx(uce, abs=1e-9)


def test_a_bin_differs_from_equal_mass_by_less_than_a_fine_bin():
    variance = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    metric = UncertaintyCalibrationError(scale_is="variance", n_bins=10)
    metric.update(torch.zeros(20000), variance, torch.zeros(20000))
    heaviest = int(metric.counts.max())
    assert len(metric.bins().counts) == 10
    edges = metric.bins().counts.cumsum(0)
    # Each edge lies at most half a fine bin from where equal mass would have it.
    assert (edges - 2000 * torch.arange(1, 11)).abs().max() <= heaviest / 2
    assert (metric.bins().variance.diff() > 0).all()


def test_a_heavy_value_goes_to_the_side_where_most_of_it_belongs():
    # 2, 7 and 1 predictions of like variance: of 5 and 5 an edge after the first 2 is the nearest.
    variance = torch.tensor([1.0] * 2 + [4.0] * 7 + [16.0]).double()
    metric = UncertaintyCalibrationError(scale_is="variance", n_bins=2)
    metric.update(torch.zeros(10), variance, torch.zeros(10))
    assert metric.bins().counts.tolist() == [2, 8]


def test_equal_variances_share_a_bin_whatever_their_order():
    target = torch.cat([torch.zeros(50), torch.ones(50)])
    for order in (target, target.flip(0)):
        value = expected_normalized_calibration_error(
            torch.zeros(100), torch.ones(100), order, scale_is="std", n_bins=10
        )
        assert float(value) == pytest.approx(1 - np.sqrt(0.5), abs=1e-12)


def test_variances_out_of_all_range_are_counted():
    metric = UncertaintyCalibrationError(scale_is="variance")
    metric.update(torch.zeros(2), torch.tensor([1e-30, 1e30]).double(), torch.zeros(2))
    assert metric.bins().counts.tolist() == [1, 1]


def test_both_errors_count_once_in_a_collection():
    metrics = MetricCollection(
        [
            ExpectedNormalizedCalibrationError(scale_is="variance", n_bins=4),
            UncertaintyCalibrationError(scale_is="variance", n_bins=7),
        ]
    )
    metrics.update(*GIVEN)
    assert len(metrics.compute_groups) == 1
    alone = uncertainty_calibration_error(*GIVEN, scale_is="variance", n_bins=7)
    assert float(metrics.compute()["UncertaintyCalibrationError"]) == float(alone)


def test_the_figure_shows_the_bins():
    metric = UncertaintyCalibrationError(scale_is="variance", n_bins=BINS)
    metric.update(*GIVEN)
    _, axes = metric.plot()
    assert axes.lines[0].get_ydata() == pytest.approx(metric.bins().squared_error.sqrt().tolist())


# ---------------------------------------------------------------- the integral transform

U = stats.norm.cdf((TARGET - MEAN) / np.sqrt(VARIANCE))


def test_the_histogram_is_numpy_s():
    metric = PITHistogram(scale_is="variance", n_bins=10)
    metric.update(*GIVEN)
    assert metric.histogram().tolist() == np.histogram(U, 10, (0, 1))[0].tolist()


def test_discrepancies_equal_scipy():
    counts = np.histogram(U, 10, (0, 1))[0]

    def value(discrepancy, n_bins=10):
        return float(
            pit_discrepancy(*GIVEN, scale_is="variance", n_bins=n_bins, discrepancy=discrepancy)
        )

    assert value("l1") == pytest.approx(np.abs(counts / N - 0.1).sum(), abs=1e-12)
    assert value("chi2") * N == pytest.approx(stats.chisquare(counts).statistic, abs=1e-9)
    exact = stats.kstest(U, "uniform").statistic
    assert exact - 1e-3 <= value("ks", 1000) <= exact


def test_calibrated_predictions_have_a_flat_histogram():
    levels = torch.special.ndtri((torch.arange(1000).double() + 0.5) / 1000)
    zero, one = torch.zeros(1000), torch.ones(1000)
    assert float(pit_discrepancy(zero, one, levels, scale_is="std")) == pytest.approx(0, abs=1e-12)
    narrow = pit_discrepancy(zero, one / 2, levels, scale_is="std")
    assert float(narrow) > 0.3


def test_a_target_far_out_belongs_to_the_last_bin():
    metric = PITHistogram(scale_is="std", n_bins=4)
    metric.update(torch.zeros(2), torch.ones(2), torch.tensor([-1e3, 1e3]))
    assert metric.histogram().tolist() == [1, 0, 0, 1]


def test_the_pit_figure_is_a_density():
    metric = PITHistogram(scale_is="variance", n_bins=10)
    metric.update(*GIVEN)
    _, axes = metric.plot()
    heights = [bar.get_height() for bar in axes.patches]
    assert sum(heights) / 10 == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (PITHistogram, {"n_bins": 1}, "n_bins"),
        (PITHistogram, {"discrepancy": "l3"}, "l1, chi2, ks"),
        (UncertaintyCalibrationError, {"n_bins": 0}, "n_bins"),
        (ExpectedNormalizedCalibrationError, {"limits": (1.0, 1.0)}, "limits"),
    ],
)
def test_bad_arguments_are_refused(kind, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        kind(scale_is="std", **arguments)
