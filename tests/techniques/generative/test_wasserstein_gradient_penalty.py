"""WGAN-GP: the linear critic's closed form, its points, and the length that it enforces."""

import pytest
import torch
from torch import nn

from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.techniques.generative.wasserstein_gradient_penalty import (
    WassersteinGradientPenalty,
    wasserstein_gradient_penalty,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import weights
from tests.techniques.generative.gan import GAN, POINTS, fit, loader

WEIGHT = torch.tensor([0.6, -1.7], dtype=torch.float64)
REAL, FAKE = POINTS[:5].double(), POINTS[5:10].double()
EPSILON = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.9], dtype=torch.float64)


def test_a_linear_critic_has_the_squared_excess_of_its_weight_wherever_it_is_asked():
    value = wasserstein_gradient_penalty(lambda x: x @ WEIGHT, REAL, FAKE, EPSILON)
    expected = (WEIGHT.norm() - 1).square().expand(5)
    torch.testing.assert_close(value, expected)


def test_points_lie_between_real_and_generated_samples():
    # D(x) = |x|^2 / 2 has gradient x, so the penalty shows the length of the point itself.
    value = wasserstein_gradient_penalty(lambda x: 0.5 * x.square().sum(1), REAL, FAKE, EPSILON)
    points = torch.stack([e * r + (1 - e) * f for e, r, f in zip(EPSILON, REAL, FAKE, strict=True)])
    torch.testing.assert_close(value, (points.norm(dim=1) - 1).square())
    # The ends: epsilon 0 is the generated sample, 1 the real one.
    torch.testing.assert_close(value[0], (FAKE[0].norm() - 1).square())
    torch.testing.assert_close(value[1], (REAL[1].norm() - 1).square())


def test_both_sides_are_penalized():
    short = wasserstein_gradient_penalty(lambda x: 0.1 * x.sum(1), REAL, FAKE, EPSILON)
    assert short[0].item() == pytest.approx((0.1 * 2**0.5 - 1) ** 2)


# cal_grad_penalty of POSTECH-CVLab/PyTorch-StudioGAN@947b35e, src/utils/losses.py, with its
# random numbers replaced by OFFICIAL_EPSILON, at D(x) = sum tanh(x)^2 over (1, 2, 2) images.
OFFICIAL_REAL = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64).view(2, 1, 2, 2)
OFFICIAL_FAKE = torch.linspace(2.0, -1.0, 8, dtype=torch.float64).view(2, 1, 2, 2)
OFFICIAL_EPSILON = torch.tensor([0.3, 0.8], dtype=torch.float64)
OFFICIAL_MEAN = 0.1394273093461763


def test_value_of_the_official_code():
    value = wasserstein_gradient_penalty(
        lambda x: torch.tanh(x).square().flatten(1).sum(1),
        OFFICIAL_REAL,
        OFFICIAL_FAKE,
        OFFICIAL_EPSILON,
    )
    assert value.mean().item() == pytest.approx(OFFICIAL_MEAN, abs=1e-12)


def test_gradients_agree_with_finite_differences():
    def penalty(first, second):
        return wasserstein_gradient_penalty(
            lambda x: torch.tanh(x @ first) @ second, REAL, FAKE, EPSILON
        )

    torch.manual_seed(0)
    first = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    second = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, (first, second))


def test_a_critic_without_slope_has_a_finite_gradient():
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    value = wasserstein_gradient_penalty(lambda x: x @ weight, REAL, FAKE, EPSILON)
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    assert (value == 1).all()
    assert torch.isfinite(gradient).all()


class Fixed(GAN):
    """The critic alone is trained, against samples that stay where they are."""

    def training_step(self, batch, batch_idx):
        real = batch[0]
        fake = real - torch.tensor([3.0, 0.0])
        _, optimizer = self.optimizers()
        loss = self.critic(fake).mean() - self.critic(real).mean()
        optimizer.zero_grad()
        self.manual_backward(self.regularize(loss, critic=self.critic, real=real, fake=fake))
        optimizer.step()


def test_training_comes_to_the_optimal_critic():
    # max w.d - lambda (|w| - 1)^2 with d = (3, 0): w along d, |w| = 1 + |d| / (2 lambda).
    critic = nn.Linear(2, 1)
    fit([WassersteinGradientPenalty(10.0)], module=Fixed(critic=critic), epochs=40)
    expected = torch.tensor([[1 + 3 / 20, 0.0]])
    torch.testing.assert_close(critic.weight.detach(), expected, rtol=0, atol=1e-4)


def test_without_it_the_critic_grows_without_bound():
    critic = nn.Linear(2, 1)
    fit(module=Fixed(critic=critic), epochs=40)
    assert critic.weight.detach().norm() > 10


def test_a_linear_critics_penalty_is_logged_exactly():
    critic = nn.Linear(2, 1)
    start = (critic.weight.detach().norm() - 1).square().item()
    technique = WassersteinGradientPenalty(10.0)
    _, run = fit([technique], module=GAN(critic=critic), epochs=1, limit_train_batches=1)
    logged = run.callback_metrics["reg/wasserstein_gradient_penalty"]
    assert logged == pytest.approx(start, rel=1e-5)


def train_on_ranks():
    torch.manual_seed(0)
    critic = nn.Linear(2, 1)
    start = critic.weight.detach().clone()
    run = rank_trainer(
        callbacks=[WassersteinGradientPenalty(10.0)],
        strategy="ddp_find_unused_parameters_true",
        max_epochs=1,
        use_distributed_sampler=False,
    )
    values = []
    module = GAN(critic=critic)
    module.on_train_batch_end = lambda *_: values.append(
        run.callback_metrics["reg/wasserstein_gradient_penalty"].item()
    )
    rank = torch.distributed.get_rank()
    run.fit(module, loader(slice(rank, None, 2), 8))
    return start, values[0], weights(module)


def test_two_ranks_log_the_closed_form_and_stay_equal(ranks):
    (start, value, first), (_, other, second) = ranks.run(train_on_ranks)
    expected = (start.norm() - 1).square().item()
    assert value == other == pytest.approx(expected, rel=1e-5)
    assert torch.equal(first, second)


def test_two_ranks_with_a_linear_critic_equal_the_joint_batch(ranks):
    _, (_, _, found) = ranks.run(train_on_ranks)
    torch.manual_seed(0)
    joint, _ = fit([WassersteinGradientPenalty(10.0)], module=GAN(nn.Linear(2, 1)), epochs=1)
    torch.testing.assert_close(found, weights(joint), rtol=0, atol=1e-6)


def test_samples_of_other_shapes_are_refused():
    class Fewer(GAN):
        def regularize(self, loss, **signals):
            if signals:
                signals["fake"] = signals["fake"][:3]
            return super().regularize(loss, **signals)

    with pytest.raises(
        RegularizationError, match=r"as many generated as real.*\(16, 2\).*\(3, 2\)"
    ):
        fit([WassersteinGradientPenalty(10.0)], module=Fewer())


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="WassersteinGradientPenalty"):
        WassersteinGradientPenalty(interval=0)
