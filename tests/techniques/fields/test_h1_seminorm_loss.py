"""H1 loss: the official numbers, and waves whose errors are known."""

import math

import pytest
import torch

from lightning_reg.techniques.fields.h1_seminorm_loss import h1_seminorm_loss

# Loss plus regularizer of WeightedL2Loss (h = gamma = 0.1) of scaomath/galerkin-transformer@f9e7d6a
# (libs/ft.py), in float64, with and without its square roots, and the gradient of the first four
# values. The target's derivative is its central difference, and zero at both ends.
U = (torch.arange(24, dtype=torch.float64).view(2, 12) * 0.7).sin() + 0.3
V = (torch.arange(24, dtype=torch.float64).view(2, 12) * 0.9).cos()
OFFICIAL = {
    True: (
        1.391605113495483 + 0.1717117232544919,
        [0.03189159853117815, -0.006982059648907023, -0.0616926487345668, -0.08613855210361511],
    ),
    False: (
        2.0364026762578895 + 0.031148587161571564,
        [0.09044828574931894, -0.038405538971809844, -0.19238278999230854, -0.26369785999383205],
    ),
}


@pytest.mark.parametrize("root", [True, False])
def test_value_and_gradient_of_the_official_code(root):
    v = V.clone().requires_grad_()
    value = h1_seminorm_loss(v, U, 0.1, root=root).mean()
    expected, gradient = OFFICIAL[root]
    assert value.item() == pytest.approx(expected, abs=1e-12)
    ours = torch.autograd.grad(value, v)[0][0, :4]
    torch.testing.assert_close(ours, torch.tensor(gradient, dtype=torch.float64))


X = torch.arange(64, dtype=torch.float64) * 2 * math.pi / 64
STEP = 2 * math.pi / 64


@pytest.mark.parametrize("k", [1, 5])
def test_a_wave_of_wrong_height_is_off_by_the_same_share_in_both_terms(k):
    u = torch.sin(k * X)[None]
    value = h1_seminorm_loss(0.7 * u, u, STEP, gamma=2.0, periodic=True)
    expected = 0.3**2 * (1 + 2.0 * STEP)
    torch.testing.assert_close(value, torch.tensor([expected], dtype=torch.float64))


def test_a_constant_error_has_no_slope():
    u = torch.sin(X)[None]
    value = h1_seminorm_loss(u + 3.0, u, STEP, gamma=1.0, data_weight=0.0)
    assert value.item() == pytest.approx(0.0, abs=1e-20)


def test_ratios_are_taken_per_sample():
    u = torch.stack([torch.sin(X), 100 * torch.sin(X)])
    value = h1_seminorm_loss(1.1 * u, u, STEP)
    torch.testing.assert_close(value[0], value[1])


def test_both_directions_count_in_two_dimensions():
    # u = sin(x) cos(2y) has slopes cos(x) cos(2y) and -2 sin(x) sin(2y); an error of sin(2y)
    # alone has its slope in y only.
    steps = (STEP, STEP / 2)
    x, y = X[:, None], (torch.arange(128, dtype=torch.float64) * STEP / 2)[None]
    u, error = torch.sin(x) * torch.cos(2 * y), torch.sin(2 * y).expand(64, 128)
    value = h1_seminorm_loss((u + error)[None], u[None], steps, 1.0, 0.0, periodic=True)

    def slope(k, h):
        return math.sin(k * h) / h

    size = (slope(1, steps[0]) ** 2 + slope(2, steps[1]) ** 2) / 4
    expected = max(steps) * slope(2, steps[1]) ** 2 / 2 / size
    assert value.item() == pytest.approx(expected, rel=1e-10)


def test_an_exact_prediction_has_a_finite_gradient():
    v = U.clone().requires_grad_()
    value = h1_seminorm_loss(v, U, 0.1, root=True).sum()
    (gradient,) = torch.autograd.grad(value, v)
    assert value.item() == 0
    assert not gradient.any()
