"""Entropy penalty: both directions, and the paper's claim on the logit gap."""

import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.outputs.confidence_penalty import confidence_penalty
from lightning_reg.techniques.outputs.entropy_penalty import EntropyPenalty, entropy_penalty
from tests.engine.simple import INPUTS, fit

LOGITS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gap(module):
    """The mean difference between the two largest logits."""
    with torch.no_grad():
        top = module(INPUTS).topk(2).values
    return (top[:, 0] - top[:, 1]).mean().item()


def test_two_classes_have_the_binary_entropy():
    # p = (1/4, 3/4): H = log 4 - 3/4 log 3.
    z = torch.tensor([[0.0, torch.log(torch.tensor(3.0))]], dtype=torch.float64)
    expected = 2 * torch.log(torch.tensor(2.0)) - 0.75 * torch.log(torch.tensor(3.0))
    assert entropy_penalty(z).item() == pytest.approx(expected.item(), abs=1e-6)


def test_maximizing_is_the_confidence_penalty():
    assert torch.equal(entropy_penalty(LOGITS, "maximize"), confidence_penalty(LOGITS))


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_gradients_agree_with_finite_differences(direction):
    z = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: entropy_penalty(z, direction), (z,))


def test_descent_moves_the_entropy_in_the_named_direction():
    for direction, sign in (("minimize", -1), ("maximize", 1)):
        z = LOGITS.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(entropy_penalty(z, direction).sum(), z)
        moved = LOGITS - 0.01 * gradient
        change = entropy_penalty(moved) - entropy_penalty(LOGITS)
        assert (change * sign > 0).all()


def test_lower_entropy_widens_the_logit_gap_and_higher_narrows_it():
    plain, _ = fit(max_epochs=20)
    surer, _ = fit([EntropyPenalty(0.5, direction="minimize")], max_epochs=20)
    flatter, _ = fit([EntropyPenalty(0.5, direction="maximize")], max_epochs=20)
    assert gap(surer) > 1.3 * gap(plain)
    assert gap(flatter) < 0.7 * gap(plain)


def test_the_log_shows_the_signed_entropy():
    _, lower = fit([EntropyPenalty(1e-3, direction="minimize")], max_epochs=1)
    _, higher = fit([EntropyPenalty(1e-3, direction="maximize")], max_epochs=1)
    assert lower.callback_metrics["reg/entropy_penalty"] > 0
    assert higher.callback_metrics["reg/entropy_penalty"] < 0


@pytest.mark.parametrize("arguments", [{"direction": "up"}, {"strength": -1.0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="EntropyPenalty"):
        EntropyPenalty(**arguments)
