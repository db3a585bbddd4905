"""The weights as published, their limits, and what they do where half the data is fitted."""

import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.engine.schedule import LinearSchedule
from lightning_reg.techniques.reweighting.dynamic_loss_reweighting import (
    DynamicLossReweighting,
    dynamic_loss_reweighting,
)
from tests.engine.simple import fit, weights

LOSSES = torch.tensor([0.1, 0.7, 1.3, 2.9, 1.9], dtype=torch.float64)
# sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025@edd6f15 src/trainer.py at r = 0.4.
OFFICIAL = {
    "linupper": [0.02716779, 0.07931766, 0.23157161, 0.33097145, 0.33097145],
    "quadratic": [0.03460760, 0.18637243, 0.40063590, 0.03460760, 0.34377653],
    "extremes": [0.38058770, 0.13035846, 0.04465023, 0.38058770, 0.06381590],
}


@pytest.mark.parametrize("strategy", OFFICIAL)
def test_equals_the_official_code(strategy):
    ours = dynamic_loss_reweighting(LOSSES, 0.4, strategy)
    np.testing.assert_allclose(ours.numpy(), OFFICIAL[strategy], atol=1e-7)
    assert ours.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("strategy", OFFICIAL)
def test_large_temperature_makes_weights_equal(strategy):
    ours = dynamic_loss_reweighting(LOSSES, 1e9, strategy)
    torch.testing.assert_close(ours, torch.full_like(ours, 0.2))


@pytest.mark.parametrize("strategy", OFFICIAL)
@pytest.mark.parametrize("value", [0.0, 2.3, 1e-9])
def test_equal_losses_get_equal_weights(strategy, value):
    ours = dynamic_loss_reweighting(torch.full((7,), value), 0.01, strategy)
    torch.testing.assert_close(ours, torch.full_like(ours, 1 / 7))


@pytest.mark.parametrize("strategy", OFFICIAL)
def test_shift_and_scale_of_the_losses_do_not_matter(strategy):
    moved = dynamic_loss_reweighting(3.0 * LOSSES + 5.0, 0.4, strategy)
    torch.testing.assert_close(moved, dynamic_loss_reweighting(LOSSES, 0.4, strategy))


def test_nothing_happens_in_the_warmup():
    technique = DynamicLossReweighting(warmup=4)
    assert torch.equal(
        weights(fit([technique], max_epochs=1)[0]), weights(fit([], max_epochs=1)[0])
    )
    later = weights(fit([technique], max_epochs=2)[0])
    assert not torch.equal(later, weights(fit([], max_epochs=2)[0]))


def test_temperature_can_be_annealed():
    seen = []

    class Records(DynamicLossReweighting):
        def weights(self, step, losses):
            seen.append((losses, super().weights(step, losses)))
            return torch.ones_like(losses)

    schedule = LinearSchedule(100.0, 0.01, end=4, by="step")
    fit([Records(temperature=schedule, warmup=0)], max_epochs=2)
    temperatures = [100.0, 75.0025, 50.005, 25.0075, 0.01, 0.01, 0.01, 0.01]
    for (losses, ours), temperature in zip(seen, temperatures, strict=True):
        torch.testing.assert_close(ours, dynamic_loss_reweighting(losses, temperature))


@pytest.mark.parametrize(
    "arguments",
    [{"strategy": "upper"}, {"temperature": 0.0}, {"temperature": -1.0}, {"warmup": -1}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="DynamicLossReweighting"):
        DynamicLossReweighting(**arguments)


def regression_error(strategy, seed):
    """Distance to the true weights where nine tenths of the samples say the same thing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat(
        [torch.tensor([[1.0, 0.0]]).repeat(90, 1), torch.randn(10, 2, generator=generator)]
    )
    truth = torch.tensor([1.0, -2.0])
    weight = torch.zeros(2, requires_grad=True)
    for _ in range(20):
        losses = (x @ weight - x @ truth).square()
        w = torch.full_like(losses, 1 / len(losses))
        if strategy is not None:
            w = dynamic_loss_reweighting(losses.detach(), 0.4, strategy)
        (gradient,) = torch.autograd.grad((w * losses).sum(), weight)
        with torch.no_grad():
            weight -= 0.1 * gradient
    return (weight - truth).norm().item()


def test_redundant_samples_slow_training_down_less():
    for seed in range(3):
        assert regression_error("linupper", seed) < 0.8 * regression_error(None, seed)
