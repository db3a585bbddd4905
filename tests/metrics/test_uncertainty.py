"""Intervals that hold the truth as often as they say, and what chance adds."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    CalibrationError,
    CalibrationUncertainty,
    ReliabilityBins,
    calibration_error,
    calibration_uncertainty,
    draw_reliability,
)
from lightning_reg.metrics.uncertainty import (
    accuracy_band,
    bootstrap_errors,
    bootstrap_interval,
    chance_error,
)

BINS = 15
MODELS = {
    "calibrated": lambda c: c,
    "slightly overconfident": lambda c: c - 0.03 * (c > 0.5),
    "overconfident": lambda c: c**2,
    "underconfident": lambda c: np.sqrt(c),
    "mixed": lambda c: np.clip(c + 0.15 * np.sin(6 * c), 0, 1),
}


def draw(rng, truth, n):
    confidence = rng.beta(4, 1.5, n)
    return confidence, rng.random(n) < truth(confidence)


def moments(confidence, correct):
    metric = CalibrationError(from_logits=False, task="binary", validate_args=False)
    metric.update(torch.from_numpy(confidence), torch.from_numpy(correct))
    return metric.moments()


def true_error(truth, power):
    """On a grid of the confidences' density."""
    c = (np.arange(3_000_000) + 0.5) / 3_000_000
    weight = c**3 * (1 - c) ** 0.5
    index = (c * BINS).astype(int)
    mass = np.bincount(index, weight, BINS)
    gap = np.abs(np.bincount(index, weight * (c - truth(c)), BINS)) / mass
    return ((mass / mass.sum()) * gap**power).sum() ** (1 / power)


def test_the_band_is_scipys_exact_interval():
    bins = ReliabilityBins(
        torch.tensor([10, 10, 7, 0, 400]), torch.zeros(5), torch.tensor([10.0, 0, 3, 0, 12])
    )
    lower, upper = accuracy_band(bins, 0.9)
    for n, k, low, high in zip(bins.counts, bins.correct_sum, lower, upper, strict=True):
        if n:
            exact = binomtest(int(k), int(n)).proportion_ci(0.9, method="exact")
            assert (float(low), float(high)) == pytest.approx((exact.low, exact.high), abs=1e-12)
        else:
            assert (float(low), float(high)) == (0, 1)


def test_the_band_covers_each_bin_in_a_thousand_models():
    rng = np.random.default_rng(0)
    share = rng.random((1000, BINS))
    n = rng.integers(1, 60, (1000, BINS))
    k = rng.binomial(n, share)
    bins = ReliabilityBins(*(torch.from_numpy(v) for v in (n, share * n, k.astype(float))))
    lower, upper = accuracy_band(bins, 0.95)
    covered = ((lower.numpy() <= share) & (share <= upper.numpy())).mean()
    # At least 0.95 by construction; 15,000 intervals have a standard error of 0.002.
    assert 0.95 <= covered < 0.99


@pytest.mark.parametrize("name", ["slightly overconfident", "underconfident", "mixed"])
def test_the_interval_covers_the_true_error_in_a_thousand_models(name):
    rng, truth = np.random.default_rng(1), MODELS[name]
    expected = true_error(truth, 1)
    held = 0
    # The other two: 0.947 (overconfident) and 1.0 (calibrated), with these draws.
    for _ in range(1000):
        interval = bootstrap_interval(moments(*draw(rng, truth, 2000)), resamples=200)
        held += interval.lower <= expected <= interval.upper
    # 1,000 intervals have a standard error of 0.007.
    assert held / 1000 >= 0.92


def test_resampling_bins_is_resampling_predictions():
    rng = np.random.default_rng(2)
    confidence, correct = draw(rng, MODELS["mixed"], 1000)
    from_bins = bootstrap_errors(moments(confidence, correct), "l2", 2000)
    index = (confidence * BINS).astype(int)
    from_samples = []
    for _ in range(2000):
        i = rng.integers(0, 1000, 1000)
        n = np.bincount(index[i], minlength=BINS)
        gap = np.bincount(index[i], confidence[i] - correct[i], BINS) / np.maximum(n, 1)
        from_samples.append(np.sqrt((n * gap**2).sum() / 1000))
    # Their standard errors are 0.0003 (mean) and 1.6 % (deviation).
    assert from_bins.mean() == pytest.approx(np.mean(from_samples), abs=0.0015)
    assert from_bins.std() == pytest.approx(np.std(from_samples), rel=0.07)


def test_the_spread_within_a_bin_is_resampled_too():
    # All outcomes are certain: what varies are the confidences, uniform in one bin.
    confidence = (np.arange(3000) + 0.5) / 3000
    metric = CalibrationError(from_logits=False, task="binary", n_bins=1)
    metric.update(torch.from_numpy(confidence), torch.ones(3000, dtype=torch.long))
    errors = bootstrap_errors(metric.moments(), resamples=4000)
    assert errors.std() == pytest.approx(np.sqrt(1 / 12 / 3000), rel=0.05)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_chance_is_what_a_calibrated_model_has(norm):
    rng = np.random.default_rng(3)
    confidence, _ = draw(rng, MODELS["calibrated"], 3000)
    power = 1 if norm == "l1" else 2
    errors = [
        float(
            calibration_error(
                torch.from_numpy(confidence),
                torch.from_numpy(rng.random(3000) < confidence),
                from_logits=False,
                task="binary",
                norm=norm,
            )
        )
        ** power
        for _ in range(600)
    ]
    expected = float(chance_error(moments(confidence, confidence < 0.5), norm))
    # The mean of 600 has a standard error of 1 %.
    assert expected == pytest.approx(np.mean(errors) ** (1 / power), rel=0.04)


def test_the_metric_gathers_error_interval_chance_and_bins():
    rng = np.random.default_rng(4)
    confidence, correct = draw(rng, MODELS["mixed"], 500)
    arguments = (torch.from_numpy(confidence), torch.from_numpy(correct))
    settings = {"from_logits": False, "task": "binary"}
    values = calibration_uncertainty(*arguments, sweep=(5, 30), **settings)
    errors = [float(calibration_error(*arguments, n_bins=n, **settings)) for n in (15, 5, 30)]
    interval = bootstrap_interval(moments(confidence, correct))
    assert {k: float(v) for k, v in values.items()} == pytest.approx(
        {
            "error": errors[0],
            "lower": interval.lower,
            "upper": interval.upper,
            "lowest": min(errors),
            "highest": max(errors),
            "chance": float(chance_error(moments(confidence, correct))),
        },
        abs=1e-9,
    )


def test_the_band_is_drawn_from_the_state():
    metric = CalibrationUncertainty(from_logits=False, task="binary")
    metric.update(torch.tensor([0.1, 0.1, 0.9]), torch.tensor([0, 1, 1]))
    lower, upper = metric.band()
    _, axes = draw_reliability(metric.bins(), level=0.95)
    drawn = axes.containers[2].lines[2][0].get_segments()
    filled = metric.bins().counts > 0
    ends = torch.stack([lower[filled], upper[filled]], 1)
    np.testing.assert_allclose([s[:, 1] for s in drawn], ends, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 1.0}, "level=0.95"),
        ({"resamples": 0}, "resamples=1000"),
        ({"norm": "l3"}, "l1, l2, max"),
        ({"view": "classwise"}, "top_label"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        CalibrationUncertainty(**{"from_logits": True, **arguments})


def test_soft_targets_are_refused():
    with pytest.raises(ArgumentError, match="neither right nor wrong"):
        calibration_uncertainty(torch.rand(9, 3), torch.rand(9, 3).softmax(1), from_logits=True)
