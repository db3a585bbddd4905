"""Sobolev norms: Parseval, single waves, a dense FFT, and noise that is learned late."""

import math

import numpy as np
import pytest
import torch

from lightning_reg.techniques.fields.sobolev_norm_loss import sobolev_norm_loss


@pytest.mark.parametrize("shape", [(3, 8), (3, 7), (3, 2, 6, 5), (3, 5, 6)])
def test_order_zero_is_the_sum_over_channels_of_mean_squares(shape):
    grid = 1 if len(shape) == 2 else 2
    r = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = r.square().flatten(-grid).mean(-1)
    expected = expected if len(shape) == grid + 1 else expected.sum(1)
    torch.testing.assert_close(sobolev_norm_loss(r, 0.0, grid_dims=grid), expected)


@pytest.mark.parametrize("s", [-1.0, 0.5])
def test_a_wave_has_its_weight(s):
    x = torch.arange(32, dtype=torch.float64) * 2 * math.pi / 32
    wave = torch.cos(5 * x)[None]
    ratio = sobolev_norm_loss(wave, s) / wave.square().mean()
    assert ratio.item() == pytest.approx(26.0**s, rel=1e-12)
    length = 0.5
    ratio = sobolev_norm_loss(wave, s, lengths=[length]) / wave.square().mean()
    assert ratio.item() == pytest.approx((1 + (2 * math.pi * 5 / length) ** 2) ** s, rel=1e-12)


@pytest.mark.parametrize("shape", [(6, 7), (5, 8)])
def test_a_full_complex_transform_agrees(shape):
    r = np.random.default_rng(0).normal(size=shape)
    k = [np.fft.fftfreq(n, 1 / n) for n in shape]
    weights = (1 + k[0][:, None] ** 2 + k[1][None] ** 2) ** -0.7
    expected = (weights * np.abs(np.fft.fft2(r) / r.size) ** 2).sum()
    ours = sobolev_norm_loss(torch.from_numpy(r)[None], -0.7, grid_dims=2)
    assert ours.item() == pytest.approx(expected, rel=1e-12)


def test_a_negative_order_learns_a_smooth_signal_before_its_noise():
    # Descent on the values of a function itself: each wave shrinks at the rate of its weight.
    x = torch.arange(64, dtype=torch.float64) * 2 * math.pi / 64
    clean = torch.sin(x) + 0.5 * torch.cos(2 * x)
    noise = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def fitted(s, size):
        v = torch.zeros(1, 64, dtype=torch.float64, requires_grad=True)
        best = math.inf
        for _ in range(60):
            loss = sobolev_norm_loss(v - clean - 0.5 * noise, s).sum()
            (gradient,) = torch.autograd.grad(loss, v)
            v = (v - size * gradient).detach().requires_grad_()
            best = min(best, (v[0] - clean).square().mean().item())
        return best

    # With s = 0 all waves come at once. Measured: 0.25 against 0.018.
    assert fitted(-1.5, 20.0) < 0.3 * fitted(0.0, 3.0)
