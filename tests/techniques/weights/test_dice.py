"""Dice: the formula, its limits, and its statistics."""

import numpy as np
import torch
from torch import nn

from lightning_reg.techniques.weights.dice import Dice, dice


def test_training_uses_the_batchs_statistics():
    x = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    module = Dice(5).double()
    with torch.no_grad():
        module.alpha.copy_(torch.linspace(-0.5, 1, 5))
    s, alpha = x.numpy(), module.alpha.detach().numpy()
    p = 1 / (1 + np.exp(-(s - s.mean(0)) / np.sqrt(s.var(0) + 1e-8)))
    np.testing.assert_allclose(module(x).detach().numpy(), p * s + (1 - p) * alpha * s, rtol=1e-10)


def test_evaluation_uses_running_statistics():
    module = Dice(2)
    for _ in range(100):
        module(torch.randn(256, 2) * 2 + 5)
    module.eval()
    x = torch.randn(3, 2)
    expected = dice(x, module.alpha, torch.full((2,), 5.0), torch.full((2,), 4.0))
    torch.testing.assert_close(module(x), expected, atol=0.05, rtol=0)


def test_slope_of_one_is_the_identity_and_far_units_are_a_prelu():
    x = torch.randn(32, 3)
    torch.testing.assert_close(dice(x, torch.ones(3), x.mean(0), x.var(0)), x)
    far = torch.tensor([[100.0], [-100.0]])
    one, zero = torch.ones(1), torch.zeros(1)
    torch.testing.assert_close(dice(far, 0.25 * one, zero, one), torch.tensor([[100.0], [-25.0]]))


def test_ranks_can_share_their_statistics():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(Dice(3))
    assert isinstance(converted.norm, nn.SyncBatchNorm)


def test_gradient():
    alpha = torch.rand(2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: dice(x, a, x.mean(0), x.var(0)), (x, alpha))
