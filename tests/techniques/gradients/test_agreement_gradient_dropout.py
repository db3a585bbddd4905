"""The probability's corners, what is kept on average, and less forgetting in fine-tuning."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.techniques.gradients.agreement_gradient_dropout import (
    AgreementGradientDropout,
    agreement_probability,
)
from tests.engine.simple import fit as fit_host


def test_corners_of_the_probability():
    task = torch.tensor([1.0, -2.0, 1.0, -1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    general = torch.tensor([3.0, -0.1, -1.0, 1.0, -3.0, -1e6, 5.0], dtype=torch.float64)
    # One sign: 1. Equal and opposite: 1/2. (1 + (1 - 3) / 4) / 2 = 1/4. Outweighed: 0.
    expected = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.25, 0.0, 0.5], dtype=torch.float64)
    found = agreement_probability(task, general)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_mean_of_the_gradient_is_its_probability_times_itself(share):
    technique = AgreementGradientDropout()
    task = torch.tensor([2.0, -1.0, 0.5]).repeat_interleave(20_000)
    general = torch.tensor([-1.0, 3.0, 1.0]).repeat_interleave(20_000)
    new, kept = technique.combine(task, general, share, torch.Generator().manual_seed(0))
    # P = (1 + 1/3) / 2, (1 - 2/4) / 2, 1; four standard errors of 20 000 draws are 0.014.
    probability = torch.tensor([2 / 3, 1 / 4, 1.0])
    means = new.view(3, -1).mean(1) / torch.tensor([2.0, -1.0, 0.5])
    torch.testing.assert_close(means, 1 - share * (1 - probability), rtol=0, atol=0.014)
    assert kept.item() == pytest.approx(probability.mean().item(), abs=0.01)


def test_first_step_is_unchanged_since_nothing_has_moved_yet():
    metrics = fit_host([AgreementGradientDropout()], max_steps=1)[1].callback_metrics
    assert metrics["reg/agreement_gradient_dropout"].item() > 0.99
    divergence = metrics["reg/agreement_gradient_dropout_second_loss"]
    assert divergence.item() == pytest.approx(0, abs=1e-6)


def task_data(seed, first):
    """Blobs of ten classes; labels of the old task, and swapped ones for half of the classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 16, generator=generator)
    labels = torch.arange(400) % 10
    x = centres[labels] + torch.randn(400, 16, generator=generator)
    keep = (labels < 5) == first
    return x[keep], labels[keep]


def forgetting(seed, drop):
    """Accuracy on old classes when the new ones are learned to a loss of 0.1."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
    old, new = task_data(seed, True), task_data(seed, False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(old[0]), old[1]).backward()
        optimizer.step()
    with torch.no_grad():
        frozen = net(new[0]).log_softmax(1)
    generator = torch.Generator().manual_seed(seed)
    weights = list(net.parameters())
    for _ in range(1000):
        logits = net(new[0])
        loss = F.cross_entropy(logits, new[1])
        if loss < 0.1:
            break
        divergence = F.kl_div(logits.log_softmax(1), frozen, log_target=True, reduction="batchmean")
        own = torch.autograd.grad(loss, weights, retain_graph=True)
        general = torch.autograd.grad(divergence, weights)
        for w, a, b in zip(weights, own, general, strict=True):
            draw = torch.rand(a.shape, generator=generator)
            w.grad = a * (agreement_probability(a, b) > draw) if drop else a
        optimizer.step()
    with torch.no_grad():
        return (net(old[0]).argmax(1) == old[1]).float().mean().item(), loss.item()


@pytest.mark.parametrize("seed", [0, 1])
def test_forgets_less_at_equal_loss_on_the_new_task(seed):
    # Seen over six seeds: the accuracy on old classes is higher by 0.23 to 0.43.
    (kept, loss), (without, loss_without) = forgetting(seed, True), forgetting(seed, False)
    assert max(loss, loss_without) < 0.1
    assert kept > without + 0.15
