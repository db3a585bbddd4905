"""Scores of Gaussian predictions against SciPy, integrals and other libraries."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    GaussianCRPS,
    GaussianNLL,
    Sharpness,
    gaussian_crps,
    gaussian_nll,
    sharpness,
)

_rng = np.random.default_rng(0)
MEAN, STD = _rng.normal(size=200), _rng.uniform(0.1, 3, 200)
TARGET = _rng.normal(size=200) * 2
GIVEN = tuple(torch.tensor(v) for v in (MEAN, STD, TARGET))
AS_VARIANCE = (GIVEN[0], GIVEN[1] ** 2, GIVEN[2])


def crps_by_integral(mean, std, y):
    below = integrate.quad(lambda x: stats.norm.cdf(x, mean, std) ** 2, y - 40 * std, y)
    above = integrate.quad(lambda x: stats.norm.sf(x, mean, std) ** 2, y, y + 40 * std)
    return below[0] + above[0]


@pytest.mark.parametrize("z", [-3.0, -0.4, 0.0, 1.7])
def test_crps_is_its_integral(z):
    value = gaussian_crps(
        *(torch.tensor([v], dtype=torch.float64) for v in (0.3, 0.8, 0.3 + 0.8 * z)),
        scale_is="std",
    )
    assert float(value) == pytest.approx(crps_by_integral(0.3, 0.8, 0.3 + 0.8 * z), abs=1e-9)


def test_crps_of_a_narrow_prediction_is_the_absolute_error():
    value = gaussian_crps(
        torch.zeros(2), torch.full((2,), 1e-12), torch.tensor([3.0, -5.0]), scale_is="std"
    )
    assert float(value) == pytest.approx(4.0, abs=1e-9)


def test_likelihood_equals_scipy():
    expected = -stats.norm.logpdf(TARGET, MEAN, STD).mean()
    assert float(gaussian_nll(*GIVEN, scale_is="std")) == pytest.approx(expected, abs=1e-12)
    full = torch.nn.functional.gaussian_nll_loss(GIVEN[0], GIVEN[2], GIVEN[1] ** 2, full=True)
    assert float(full) == pytest.approx(expected, abs=1e-9)


def test_likelihood_does_not_clamp_a_prediction_that_is_too_sure():
    sure = (torch.zeros(1).double(), torch.full((1,), 1e-12).double(), torch.full((1,), 1e-3))
    expected = -stats.norm.logpdf(1e-3, 0, 1e-6)
    assert float(gaussian_nll(*sure, scale_is="variance")) == pytest.approx(expected, rel=1e-6)
    clamped = torch.nn.functional.gaussian_nll_loss(sure[0], sure[2], sure[1], full=True)
    assert float(clamped) < 0 < expected


def test_sharpness_is_the_root_of_the_mean_variance():
    expected = math.sqrt((STD**2).mean())
    assert float(sharpness(*GIVEN, scale_is="std")) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("function", [gaussian_crps, gaussian_nll, sharpness])
def test_std_and_variance_say_the_same(function):
    one, other = function(*GIVEN, scale_is="std"), function(*AS_VARIANCE, scale_is="variance")
    assert float(one) == pytest.approx(float(other), abs=1e-12)


def test_equals_properscoring_and_uncertainty_toolbox():
    properscoring = pytest.importorskip("properscoring")
    expected = properscoring.crps_gaussian(TARGET, MEAN, STD).mean()
    assert float(gaussian_crps(*GIVEN, scale_is="std")) == pytest.approx(expected, abs=1e-12)


def test_torchmetrics_ensemble_score_comes_near():
    from torchmetrics.regression import ContinuousRankedProbabilityScore

    # 400 equally likely draws: their quantiles, so that nothing is random.
    z = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    ensemble = ContinuousRankedProbabilityScore()
    ensemble.update(torch.tensor(MEAN[:, None] + STD[:, None] * z), GIVEN[2])
    assert float(ensemble.compute()) == pytest.approx(
        float(gaussian_crps(*GIVEN, scale_is="std")), abs=5e-3
    )


@pytest.mark.parametrize("kind", [GaussianCRPS, GaussianNLL, Sharpness])
def test_the_scale_is_never_guessed(kind):
    with pytest.raises(TypeError, match="scale_is"):
        kind()
    with pytest.raises(ArgumentError, match="std, variance"):
        kind(scale_is="sigma")


def test_a_scale_of_zero_is_refused_with_its_cure():
    with pytest.raises(ArgumentError, match="clamp_min"):
        gaussian_nll(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.zeros(2), scale_is="std")
