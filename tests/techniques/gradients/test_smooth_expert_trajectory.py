"""Closed forms of penalty and matching, and a path with even steps."""

from itertools import pairwise

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.gradients.smooth_expert_trajectory import (
    SmoothExpertTrajectory,
    smooth_expert_penalty,
    trajectory_matching,
)
from tests.engine.simple import Host, fit, trainer


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("center", [1.0, 0.0])
def test_linear_network_pays_for_the_length_of_the_sum_of_its_rows(center):
    w, x = normal(3, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    value = smooth_expert_penalty(x @ w.T, x, center)
    length = w.sum(0).norm()
    torch.testing.assert_close(value, ((length - center) ** 2).expand(4))
    (gradient,) = torch.autograd.grad(value.mean(), w)
    torch.testing.assert_close(gradient[0], 2 * (length - center) * w.sum(0) / length)


def test_norm_of_an_image_is_that_of_each_pixel_over_its_channels():
    x = normal(2, 3, 4, 5).requires_grad_()
    w = normal(3, 4, 5, seed=1)
    value = smooth_expert_penalty((x * w).flatten(1), x)
    expected = (w.square().sum(0).sqrt() - 1).square().mean()
    torch.testing.assert_close(value, expected.expand(2))


START, END = [normal(3, 2), normal(4)], [normal(3, 2, seed=1), normal(4, seed=2)]


def test_matching_is_one_without_progress_and_zero_at_the_target():
    assert trajectory_matching([START], START, [END]).item() == 1
    assert trajectory_matching([END], START, [END]).item() == 0
    half = [(a + b) / 2 for a, b in zip(START, END, strict=True)]
    assert trajectory_matching([half], START, [END]).item() == pytest.approx(0.25)


def test_gradient_of_matching_points_from_the_target_scaled_by_the_way():
    student = [w.clone().requires_grad_() for w in START]
    found = torch.autograd.grad(trajectory_matching([student], START, [END]), student)
    way = sum((a - b).square().sum() for a, b in zip(START, END, strict=True))
    torch.testing.assert_close(found[1], 2 * (START[1] - END[1]) / way)


def test_intermediate_moments_count_all_alike_or_the_later_the_more():
    moments = [START, START, END]
    targets = [END, [2 * w for w in END], END]
    # Terms of 1, 1 and 0.
    assert trajectory_matching(moments, START, targets).item() == pytest.approx(2)
    growing = trajectory_matching(moments, START, targets, growing=True)
    assert growing.item() == pytest.approx(1 / 3 + 2 / 3)
    with pytest.raises(ArgumentError, match="for each target"):
        trajectory_matching(moments, START, targets[:2])


def test_clips_the_loss_by_the_factor_of_the_epoch():
    # Without the penalty's part: the center is where a network of zeros has its gradient.
    pulled = {}
    for factor in (1.0, 0.25):
        technique = SmoothExpertTrajectory(1e-12, clip=[factor], record=True)
        fit([technique], Host(), max_epochs=2, batch_size=64)
        first, second, third = (t["net.4.bias"] for t in technique.trajectory)
        pulled[factor] = second - first, third - second
    torch.testing.assert_close(pulled[0.25][0], 0.25 * pulled[1.0][0])
    # The second epoch has the loss as it is, and what is left of the momentum.
    assert pulled[0.25][1].norm() > 0.6 * pulled[1.0][1].norm()


def test_records_the_start_and_every_epoch_and_averages_steps():
    plain = SmoothExpertTrajectory(1e-12, clip=(), record=True)
    smooth = SmoothExpertTrajectory(1e-12, clip=(), record=True, average=0.75)
    for technique in (plain, smooth):
        module, _ = fit([technique], Host(), max_epochs=3, batch_size=64)
    path = [t["net.0.weight"] for t in plain.trajectory]
    assert len(path) == 4
    assert torch.equal(path[0], Host().net[0].weight)
    assert torch.equal(path[3], module.net[0].weight)
    mean = path[0]
    for step, now in enumerate(path[1:], 1):
        mean = 0.75 * mean + 0.25 * now
        torch.testing.assert_close(smooth.trajectory[step]["net.0.weight"], mean)


class Expert(L.LightningModule):
    """Learns blobs of four classes, fast at first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def expert(**arguments):
    """How far the weights move in each epoch, the loss at the end, and the penalty there."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    centres = 2 * torch.randn(4, 8, generator=generator)
    x = centres[labels] + torch.randn(64, 8, generator=generator)
    technique, module = SmoothExpertTrajectory(record=True, **arguments), Expert()
    run = trainer([technique], max_epochs=20)
    run.fit(module, DataLoader(TensorDataset(x, labels), batch_size=32))
    flat = [torch.cat([w.reshape(-1) for w in t.values()]) for t in technique.trajectory]
    steps = torch.stack([(b - a).norm() for a, b in pairwise(flat)])
    x.requires_grad_()
    penalty = smooth_expert_penalty(module(x), x).mean().item()
    return steps, run.callback_metrics["loss"].item(), penalty


def test_clipping_makes_the_steps_of_the_path_more_even_at_a_like_loss():
    # Seen: largest epochs of 0.16 and 0.30, final losses of 0.140 and 0.122.
    clipped, loss, _ = expert(strength=1e-12)
    plain, plain_loss, _ = expert(strength=1e-12, clip=())
    assert clipped.max() < 0.6 * plain.max()
    assert clipped.std() / clipped.mean() < 0.7 * plain.std() / plain.mean()
    assert loss < plain_loss + 0.03


def test_penalty_holds_input_gradients_at_its_center():
    # Seen: 0.004 with the penalty, 0.29 without.
    assert expert(strength=2.0)[2] < 0.02
    assert expert(strength=1e-12)[2] > 0.2
