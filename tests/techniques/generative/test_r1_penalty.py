"""R1: the linear critic's closed form, and the convergence that it is for."""

import pytest
import torch
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.generative.r1_penalty import R1Penalty, r1_penalty
from lightning_reg.testing.ranks import rank_trainer
from tests.techniques.generative.gan import GAN, POINTS, fit, loader

WEIGHT = torch.tensor([0.6, -1.7], dtype=torch.float64)


def test_a_linear_critic_has_half_its_squared_weight():
    x = POINTS.double()
    value = r1_penalty(lambda x: x @ WEIGHT + 3.0, x)
    torch.testing.assert_close(value, 0.5 * WEIGHT.square().sum().expand(64))


def test_a_quadratic_critic_has_the_squared_distance():
    # D(x) = |x - m|^2 / 2 has gradient x - m.
    centre = torch.tensor([1.0, 2.0], dtype=torch.float64)
    x = POINTS.double()
    value = r1_penalty(lambda x: 0.5 * (x - centre).square().sum(1, keepdim=True), x)
    torch.testing.assert_close(value, 0.5 * (x - centre).square().sum(1))


def test_a_map_of_scores_is_summed():
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    value = r1_penalty(lambda x: 2.0 * x, images)
    torch.testing.assert_close(value, torch.full((3,), 0.5 * 16 * 4.0, dtype=torch.float64))


# cal_r1_reg of POSTECH-CVLab/PyTorch-StudioGAN@947b35e, src/utils/losses.py, at
# D(x) = sum tanh(x)^2 over (1, 2, 2) images; see OFFICIAL_X.
OFFICIAL_X = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64).view(2, 1, 2, 2)
OFFICIAL_MEAN = 0.6072198496352582


def test_value_of_the_official_code():
    value = r1_penalty(lambda x: torch.tanh(x).square().flatten(1).sum(1), OFFICIAL_X)
    assert value.mean().item() == pytest.approx(OFFICIAL_MEAN, abs=1e-12)


def test_gradients_agree_with_finite_differences():
    def penalty(first, second):
        return r1_penalty(lambda x: torch.tanh(x @ first) @ second, POINTS[:4].double())

    first = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    second = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, (first, second))


class Dirac(GAN):
    """Mescheder et al.'s example: all data at 0, a generator that is a point, D(x) = psi x."""

    def __init__(self):
        super().__init__(critic=nn.Linear(1, 1, bias=False))
        self.generator = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.critic.weight)
        nn.init.ones_(self.generator.weight)

    def training_step(self, batch, batch_idx):
        one = torch.ones(4, 1)
        super().training_step((torch.zeros(4, 1), one), batch_idx)

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), 0.1) for m in (self.generator, self.critic)]


@pytest.mark.parametrize("interval", [1, 4])
def test_the_dirac_gan_converges_with_it_and_circles_without(interval):
    plain, _ = fit(module=Dirac(), epochs=100)
    ours, _ = fit([R1Penalty(1.0, interval=interval)], module=Dirac(), epochs=100)
    radius = plain.generator.weight.item() ** 2 + plain.critic.weight.item() ** 2
    assert radius > 0.5
    assert abs(ours.generator.weight.item()) < 1e-3
    assert abs(ours.critic.weight.item()) < 1e-3


def test_a_linear_critics_penalty_is_logged_exactly():
    critic = nn.Linear(2, 1)
    start = 0.5 * critic.weight.detach().square().sum().item()
    _, run = fit([R1Penalty(10.0)], module=GAN(critic=critic), epochs=1, limit_train_batches=1)
    assert run.callback_metrics["reg/r1_penalty"] == pytest.approx(start, rel=1e-6)


def train_on_ranks():
    torch.manual_seed(0)
    critic = nn.Linear(2, 1)
    run = rank_trainer(
        callbacks=[R1Penalty(10.0)],
        strategy="ddp_find_unused_parameters_true",
        max_epochs=1,
        limit_train_batches=1,
        use_distributed_sampler=False,
    )
    rank = torch.distributed.get_rank()
    start = critic.weight.detach().clone()
    run.fit(GAN(critic=critic), loader(slice(rank, None, 2), 8))
    return start, run.callback_metrics["reg/r1_penalty"].item()


def test_two_ranks_log_the_closed_form(ranks):
    for start, value in ranks.run(train_on_ranks):
        assert value == pytest.approx(0.5 * start.square().sum().item(), rel=1e-6)


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="R1Penalty"):
        R1Penalty(interval=0)
