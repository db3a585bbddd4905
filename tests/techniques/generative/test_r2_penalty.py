"""R2: R1's numbers, at generated samples."""

import pytest
import torch
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.generative.r2_penalty import R2Penalty, r2_penalty
from tests.techniques.generative.gan import GAN, fit
from tests.techniques.generative.test_r1_penalty import OFFICIAL_MEAN, OFFICIAL_X, Dirac


def test_value_of_r1s_official_code_at_the_same_points():
    value = r2_penalty(lambda x: torch.tanh(x).square().flatten(1).sum(1), OFFICIAL_X)
    assert value.mean().item() == pytest.approx(OFFICIAL_MEAN, abs=1e-12)


class Square(nn.Module):
    """D(x) = a |x|^2 / 2, whose gradient a x tells at which points it was taken."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.a * 0.5 * x.square().sum(1, keepdim=True)


def test_it_is_taken_where_the_generator_is():
    module = GAN(critic=Square())
    with torch.no_grad():
        module.generator[2].weight.zero_()
        module.generator[2].bias.copy_(torch.tensor([3.0, 4.0]))
    _, run = fit([R2Penalty(1.0)], module=module, epochs=1, limit_train_batches=1)
    assert run.callback_metrics["reg/r2_penalty"].item() == pytest.approx(12.5, rel=1e-6)


@pytest.mark.parametrize("interval", [1, 4])
def test_the_dirac_gan_converges_with_it_and_circles_without(interval):
    plain, _ = fit(module=Dirac(), epochs=100)
    ours, _ = fit([R2Penalty(1.0, interval=interval)], module=Dirac(), epochs=100)
    assert plain.generator.weight.item() ** 2 + plain.critic.weight.item() ** 2 > 0.5
    assert abs(ours.generator.weight.item()) < 1e-3
    assert abs(ours.critic.weight.item()) < 1e-3


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="R2Penalty"):
        R2Penalty(interval=0)
