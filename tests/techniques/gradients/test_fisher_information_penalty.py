"""Input-Fisher: the trace in closed form, as the curvature of KL, and what training does."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.techniques.gradients.fisher_information_penalty import (
    FisherInformationPenalty,
    fisher_information_penalty,
)
from tests.engine.simple import INPUTS, fit

W = (torch.arange(12, dtype=torch.float64).view(4, 3) * 0.5).sin()
X = (torch.arange(6, dtype=torch.float64).view(2, 3) * 0.9).cos()


def trace(x, samples="exact", seed=0):
    x = x.clone().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    return fisher_information_penalty(torch.tanh(x) @ W.T, x, samples, generator)


def test_a_linear_classifier_has_the_variance_of_its_weights():
    # d log p_y / dx = w_y - E_p w, so the trace is E_p |w|^2 - |E_p w|^2.
    x = X.clone().requires_grad_()
    p = (x @ W.T).softmax(1).detach()
    mean = p @ W
    expected = p @ W.square().sum(1) - mean.square().sum(1)
    torch.testing.assert_close(fisher_information_penalty(x @ W.T, x), expected)


def test_it_is_the_curvature_of_the_divergence():
    step, total = 1e-4, torch.zeros(2, dtype=torch.float64)
    log_p = (torch.tanh(X) @ W.T).log_softmax(1)
    for direction in torch.eye(3, dtype=torch.float64):
        moved = (torch.tanh(X + step * direction) @ W.T).log_softmax(1)
        total += 2 * (log_p.exp() * (log_p - moved)).sum(1) / step**2
    # The next order of the expansion.
    torch.testing.assert_close(trace(X), total, rtol=1e-3, atol=1e-4)


def test_drawn_classes_are_unbiased():
    draws = torch.stack([trace(X, 1, seed) for seed in range(2000)]).detach()
    error = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - trace(X)).abs() < 4 * error).all()
    assert (error > 0).all()


def largest_change(module, radius=0.3):
    """KL after gradient ascent on it in a ball around each input."""
    log_p = module.net(INPUTS).log_softmax(1).detach()
    torch.manual_seed(0)
    moved = INPUTS + 0.01 * torch.randn_like(INPUTS)
    for _ in range(10):
        moved.requires_grad_()
        loss = F.kl_div(module.net(moved).log_softmax(1), log_p, log_target=True, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = INPUTS + (moved + 0.1 * gradient.sign() - INPUTS).clamp(-radius, radius).detach()
    last = module.net(moved).log_softmax(1)
    return F.kl_div(last, log_p, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("samples", ["exact", 1])
def test_an_attack_changes_the_answers_less(samples):
    plain, _ = fit(max_epochs=60)
    ours, _ = fit([FisherInformationPenalty(0.1, samples=samples)], max_epochs=60)
    # Measured: 0.2 of it with the exact trace, 0.3 with one class a sample.
    assert largest_change(ours) < 0.6 * largest_change(plain)
