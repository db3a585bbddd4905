"""Aggregate responses: the identity of the two losses, and an interpolation better than both."""

import pytest
import torch

from lightning_reg import BagInstanceInterpolation
from lightning_reg.engine import RegularizationError, Signals
from lightning_reg.functional import bag_instance_interpolation
from tests.engine.simple import fit

BAGS = torch.tensor([7, -2, 7, 7, -2, 40, 7, 40])


def fixed(*shape):
    """Numbers that need no generator."""
    size = torch.Size(shape).numel()
    return (torch.arange(size, dtype=torch.float64).view(shape) * 1.7).sin() * 3


def of_bags(values):
    """The mean of each sample's bag, bag by bag."""
    return torch.stack([values[bag == BAGS].mean(0) for bag in BAGS])


@pytest.mark.parametrize("shape", [(8,), (8, 3)])
def test_at_one_it_is_the_loss_on_samples_and_at_zero_that_on_bags(shape):
    f, y = fixed(*shape), of_bags(fixed(*shape).roll(3, 0))
    on_samples = (f - y).square().mean()
    on_bags = (of_bags(f) - y).square().mean()
    torch.testing.assert_close(bag_instance_interpolation(f, y, BAGS, 1.0), on_samples)
    torch.testing.assert_close(bag_instance_interpolation(f, y, BAGS, 0.0), on_bags)
    between = bag_instance_interpolation(f, y, BAGS, 0.25)
    torch.testing.assert_close(between, 0.75 * on_bags + 0.25 * on_samples)


def test_of_single_labels_only_their_mean_is_used():
    f, y = fixed(8), fixed(8).roll(3)
    found = bag_instance_interpolation(f, y, BAGS, 0.3)
    torch.testing.assert_close(found, bag_instance_interpolation(f, of_bags(y), BAGS, 0.3))


def risk(rho, seed, bags=20, size=5, features=15, noise=1.0):
    """The squared distance of the best linear model by its bags' responses from the true one."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    truth = torch.randn(features, **draw) / features**0.5
    x = torch.randn(bags * size, features, **draw)
    bag = torch.arange(bags).repeat_interleave(size)
    y = x @ truth + noise * torch.randn(bags * size, **draw)

    def loss(theta):
        return bag_instance_interpolation(x @ theta, y, bag, rho)

    start = torch.zeros(features, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, start)
    curvature = torch.autograd.functional.hessian(loss, start)
    best = torch.linalg.lstsq(curvature, -slope[:, None]).solution[:, 0]
    return (best - truth).square().sum()


def test_an_interpolation_has_less_risk_than_both_ends():
    # Mean of 20 draws: 3.78 at 0, 0.58 at 0.2, 0.69 at 1.
    mean = {rho: sum(risk(rho, seed) for seed in range(20)) / 20 for rho in (0.0, 0.2, 1.0)}
    assert mean[0.2] < 0.92 * mean[1.0]
    assert mean[0.2] < 0.3 * mean[0.0]


def test_labels_that_are_no_responses_are_refused():
    with pytest.raises(RegularizationError, match="bag_mean"):
        fit([BagInstanceInterpolation(signals=Signals(domain="batch.1"))], max_epochs=1)
