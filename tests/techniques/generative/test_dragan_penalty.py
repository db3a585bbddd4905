"""DRAGAN and the sides of a gradient penalty: linear critics, and where the points lie."""

import pytest
import torch
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.generative.dragan_penalty import DraganPenalty, dragan_penalty
from lightning_reg.techniques.generative.wasserstein_gradient_penalty import (
    WassersteinGradientPenalty,
    wasserstein_gradient_penalty,
)
from tests.techniques.generative.gan import GAN, POINTS, fit

REAL = POINTS[:6].double()
ALPHA = torch.linspace(0, 1, 6, dtype=torch.float64)


def linear(length):
    weight = length * torch.tensor([0.6, 0.8], dtype=torch.float64)
    return lambda x: x @ weight


@pytest.mark.parametrize("length", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("center", "one_sided"), [(1.0, False), (1.0, True), (0.0, False)])
def test_a_linear_critic_in_closed_form(length, center, one_sided):
    gap = length - center
    expected = torch.full((6,), max(gap, 0.0) ** 2 if one_sided else gap**2, dtype=torch.float64)
    noise = torch.ones_like(REAL)
    ours = dragan_penalty(linear(length), REAL, noise, ALPHA, center, one_sided)
    torch.testing.assert_close(ours, expected)
    ours = wasserstein_gradient_penalty(linear(length), REAL, -REAL, ALPHA, center, one_sided)
    torch.testing.assert_close(ours, expected)


def test_points_lie_alpha_of_the_noise_away():
    # D(x) = |x|^2 / 2 has gradient x.
    noise = torch.full_like(REAL, 2.0)
    ours = dragan_penalty(lambda x: 0.5 * x.square().sum(1), REAL, noise, ALPHA)
    expected = ((REAL + 2.0 * ALPHA[:, None]).norm(dim=1) - 1).square()
    torch.testing.assert_close(ours, expected)


def test_points_reach_as_far_as_scale_standard_deviations():
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.sum(1)

    real = 3 * torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    technique = DraganPenalty(scale=2.0)
    technique.values(critic, real, None, torch.Generator().manual_seed(1))
    moved = (seen[0] - real) / real.std()
    assert moved.min() >= 0
    assert 1.9 < moved.max() <= 2.0
    # One alpha a sample: E[alpha u] = 1/2; E[alpha^2 u_1 u_2] = 1/3 for numbers of one sample.
    assert moved.mean().item() == pytest.approx(0.5, abs=0.03)
    assert (moved[:, 0] * moved[:, 1]).mean().item() == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize(
    ("technique", "key"),
    [
        (DraganPenalty, "reg/dragan_penalty"),
        (WassersteinGradientPenalty, "reg/wasserstein_gradient_penalty"),
    ],
)
def test_the_callbacks_hand_their_sides_on(technique, key):
    def first_value(**kwargs):
        critic = nn.Linear(2, 1)
        with torch.no_grad():
            critic.weight.copy_(torch.tensor([[0.3, 0.4]]))
        module = GAN(critic=critic)
        settings = {"epochs": 1, "limit_train_batches": 1}
        _, run = fit([technique(**kwargs)], module=module, **settings)
        return run.callback_metrics[key].item()

    assert first_value() == pytest.approx(0.25, rel=1e-5)
    assert first_value(one_sided=True) == 0
    assert first_value(one_sided=True, center=0.2) == pytest.approx(0.09, rel=1e-5)


def test_bad_arguments_are_refused():
    for arguments in ({"scale": -1.0}, {"center": -0.1}, {"interval": 0}):
        with pytest.raises(ArgumentError, match="DraganPenalty"):
            DraganPenalty(**arguments)
    with pytest.raises(ArgumentError, match="WassersteinGradientPenalty"):
        WassersteinGradientPenalty(center=-0.1)
