"""Learned masks: their density, their blur, the policy gradient, and what a policy learns."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import Communicator, RegularizationError
from lightning_reg.engine.schedule import StepSchedule
from lightning_reg.mechanisms.own_network import OwnNetwork
from lightning_reg.techniques.inputs.learned_noise_mask import (
    LearnedNoiseMask,
    beta_log_density,
    noise_mask,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import Host, trainer


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_density_is_that_of_scipy():
    log_alpha, log_beta = torch.randn(2, 3, 4, dtype=torch.float64, generator=_generator())
    mask = torch.rand(3, 4, dtype=torch.float64, generator=_generator(1))
    expected = stats.beta(log_alpha.exp().numpy(), log_beta.exp().numpy()).logpdf(mask.numpy())
    found = beta_log_density(log_alpha, log_beta, mask)
    assert found.tolist() == pytest.approx(expected.sum(1).tolist(), rel=1e-10)


def test_policy_gradient_is_that_of_the_expected_reward():
    """For the reward m, E m = a / (a + b) and its gradient by log a is a b / (a + b)^2."""
    a, b = 2.0, 3.0
    log_alpha = torch.full((1, 1), a, dtype=torch.float64).log().requires_grad_()
    log_beta = torch.full((1, 1), b, dtype=torch.float64).log()
    draws = torch.tensor(stats.beta(a, b).rvs(400_000, random_state=0)).unsqueeze(1)
    for baseline in (0.0, 0.4):
        reward = draws[:, 0]
        density = beta_log_density(log_alpha.expand_as(draws), log_beta.expand_as(draws), draws)
        (found,) = torch.autograd.grad(((reward - baseline) * density).mean(), log_alpha)
        assert found.item() == pytest.approx(a * b / (a + b) ** 2, abs=0.006)


def test_mask_is_upsampled_and_blurred_as_by_scipy():
    grid = torch.rand(2, 3, 3, dtype=torch.float64, generator=_generator())
    found = noise_mask(grid, 12, 12, kernel=5, sigma=1.5).numpy()[:, 0]
    big = np.kron(grid.numpy(), np.ones((1, 4, 4)))
    expected = np.stack([ndimage.gaussian_filter(m, 1.5, mode="mirror", radius=2) for m in big])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(noise_mask(grid, 12, 12, kernel=1).numpy()[:, 0], big)


class Images(Host):
    """Tells by the right half of an image whether it is bright there; the left half is noise."""

    def __init__(self, lr=0.02):
        super().__init__(lr=lr)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch[0].detach())
        return F.cross_entropy(self(batch[0]), batch[1])


def _images(samples=128):
    x = torch.rand(samples, 1, 8, 8, generator=_generator()) + 0.5
    y = torch.arange(samples) % 2
    x[:, :, :, 4:] *= torch.where(y == 1, 1.0, -1.0).view(-1, 1, 1, 1)
    return TensorDataset(x, y)


def _loader(batch_size=32, samples=128):
    return DataLoader(_images(samples), batch_size=batch_size)


class Constant(nn.Module):
    """A policy that says the same of every image."""

    def __init__(self, cells):
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(2 * cells))

    def forward(self, x):
        return self.logs.expand(len(x), -1)


def _settings(**changes):
    return {"grid": 2, "kernel": 1, "channels": 1, "policy": Constant(4), **changes}


def test_policy_learns_to_spare_what_the_class_needs():
    """Measured after 320 steps: mean masks up to 0.50 on the left, from 0.69 on the right."""
    technique = LearnedNoiseMask(**_settings(lr=0.2, decay=0.0, momentum=0.0, weight_decay=0.0))
    trainer([technique], max_epochs=80).fit(Images(lr=0.02), _loader())
    alpha, beta = technique.policy.logs.detach().exp().view(2, 2, 2)
    means = alpha / (alpha + beta)
    assert means[:, 1].min() > means[:, 0].max() + 0.1


def test_images_are_multiplied_with_masks_of_their_own():
    module = Images(lr=0.0)
    trainer([LearnedNoiseMask(**_settings())], max_epochs=1).fit(module, _loader())
    plain = next(iter(_loader()))[0]
    masks = module.batches[0] / plain
    assert masks.min() > 0
    assert masks.max() < 1
    assert torch.isclose(masks[:, :, :4, :4], masks[:, :, :1, :1], atol=1e-6).all()
    assert masks[:, 0, 0, 0].unique().numel() == 32


def test_after_heating_the_batches_are_left_alone():
    module = Images()
    heating = LearnedNoiseMask(StepSchedule([1.0, 0.0], [1], by="epoch"), **_settings())
    trainer([heating], max_epochs=2).fit(module, _loader())
    plain = [batch[0] for batch in _loader()]
    same = [torch.equal(a, b) for a, b in zip(module.batches, plain * 2, strict=True)]
    assert same == [False] * 4 + [True] * 4


def test_default_policy_starts_by_saying_the_same_of_every_image():
    technique = LearnedNoiseMask(grid=3, kernel=1, channels=1)
    trainer([technique], max_epochs=1, limit_train_batches=1).fit(Images(), _loader())
    # After one step: zeros moved by one step of lr 0.01.
    said = technique._own(next(iter(_loader()))[0])
    assert said.shape == (32, 18)
    assert 0 < said.abs().max() < 0.1


def test_own_network_steps_on_the_mean_over_all_samples_of_a_window():
    def make(parameters):
        return torch.optim.SGD(parameters, 1.0)

    x = torch.randn(6, 3, generator=_generator())
    torch.manual_seed(0)
    own = OwnNetwork(nn.Linear(3, 1, bias=False), make, sums=2)
    before = own.network.weight.detach().clone()
    for part in (x[:2], x[2:]):
        own.collect(own(part).sum(), torch.tensor([float(len(part)), 1.0]))
    assert own.step(Communicator()).tolist() == [6.0, 2.0]
    torch.testing.assert_close(own.network.weight.detach(), before - x.mean(0, keepdim=True))
    moved = own.network.weight.detach().clone()
    own.collect(own(x * torch.nan).sum(), torch.tensor([6.0, 0.0]))
    assert own.step(Communicator()) is None
    assert own.step(Communicator()) is None
    assert torch.equal(own.network.weight, moved)


def _on_rank():
    """Ranks that transform by chance: only some of them have a reward."""
    technique = LearnedNoiseMask(0.5, **_settings())
    run = rank_trainer(callbacks=[technique], max_epochs=4)
    run.fit(Images(), _loader(batch_size=8))
    return technique.policy.logs.detach().tolist()


def test_ranks_of_which_one_has_no_masks_keep_one_policy(ranks):
    one, other = ranks.run(_on_rank)
    assert one == other
    assert any(one)


def test_what_cannot_be_masked_is_named():
    for settings, problem in (
        (_settings(kernel=17), "more than 8 pixels"),
        ({"grid": 2, "kernel": 1}, "of 3 channels, got 1"),
        (_settings(policy=Constant(3)), r"needs \(32, 8\) numbers"),
    ):
        with pytest.raises(RegularizationError, match=problem):
            trainer([LearnedNoiseMask(**settings)], max_epochs=1).fit(Images(), _loader())
