"""Gradient norms: a quadratic's closed form, the official edit, and what training ends with."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.techniques.gradients.finite_difference_gradient_regularizer import (
    FiniteDifferenceGradientRegularizer,
    finite_difference_gradient,
)
from lightning_reg.techniques.gradients.gradient_norm_penalty import (
    GradientNormPenalty,
    gradient_norm_penalty,
)
from tests.engine.simple import INPUTS, LABELS, Host, fit

H = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
W = torch.tensor([0.7, -1.3], dtype=torch.float64)


def quadratic(w):
    return 0.5 * w @ H @ w


def test_a_quadratic_has_the_gradient_twice_h_g():
    w = W.clone().requires_grad_()
    value = gradient_norm_penalty(quadratic(w), [w])
    g = H @ W
    torch.testing.assert_close(value, g @ g)
    torch.testing.assert_close(torch.autograd.grad(value, w)[0], 2 * H @ g)


@pytest.mark.parametrize("epsilon", [0.01, 0.5, -0.3])
def test_the_difference_is_exact_on_a_quadratic_for_any_step(epsilon):
    g, gamma = H @ W, 0.2
    moved = H @ (W + epsilon * g)
    ours = finite_difference_gradient([g], [moved], gamma / epsilon)[0]
    torch.testing.assert_close(ours, g + gamma * H @ g)


def test_a_step_of_gamma_is_the_gradient_at_the_moved_weights():
    g = H @ W
    moved = H @ (W + 0.2 * g)
    torch.testing.assert_close(finite_difference_gradient([g], [moved], 1.0)[0], moved)


# Gradients that GradRegularizer of JonasGeiping/fullbatchtraining@5a772a2 makes
# (fullbatch/models/modules.py; lr 0.4, block_strength 0.5, eps 0.01), float64, the first four.
WEIGHT = (torch.arange(12).double().view(3, 4) * 0.9).sin()
X = (torch.arange(20).double().view(5, 4) * 0.6).cos()
Y = torch.tensor([0, 2, 1, 1, 0])
OFFICIAL = {
    "forward": [
        0.23324964109425944,
        0.17313030218549932,
        0.05253156773327569,
        -0.08641795467087483,
    ],
    "exact": [0.23329115561874567, 0.173162442773127, 0.052543106752095926, -0.08643104813211575],
    "exact-pen": [
        0.23234002330741896,
        0.17293596091093125,
        0.05312039196942021,
        -0.08525165817028278,
    ],
}


def loss_of(w):
    return F.cross_entropy(3 * torch.tanh(X @ w.T), Y)


def gradient_at(w):
    w = w.clone().requires_grad_()
    return torch.autograd.grad(loss_of(w), w)[0]


def first_four(gradient, expected):
    ours = gradient.flatten()[:4]
    torch.testing.assert_close(ours, torch.tensor(OFFICIAL[expected], dtype=torch.float64))


def test_the_official_forward_difference():
    g = gradient_at(WEIGHT)
    step = 0.01 / g.norm()
    gamma = 0.4 / 4 * 0.5
    moved = gradient_at(WEIGHT + step * g)
    first_four(finite_difference_gradient([g], [moved], gamma / step)[0], "forward")


@pytest.mark.parametrize(("strength", "mode"), [(0.25, "exact"), (0.5, "exact-pen")])
def test_the_official_double_backward_and_its_factor_of_two(strength, mode):
    w = WEIGHT.clone().requires_grad_()
    total = loss_of(w) + strength * 0.4 / 4 * gradient_norm_penalty(loss_of(w), [w])
    first_four(torch.autograd.grad(total, w)[0], mode)


def step_of(technique, **kwargs):
    """The gradient of the first step: what the weights moved by."""
    module = Host(lr=1.0, **kwargs).double()
    before = [p.detach().clone() for p in module.parameters()]
    fit([technique], module=module, max_epochs=1, limit_train_batches=1, precision="64-true")
    return [b - p.detach() for b, p in zip(before, module.parameters(), strict=True)]


def by_hand(gamma):
    module = Host().double()
    weights = list(module.parameters())
    loss = F.cross_entropy(module.net(INPUTS[:16].double()), LABELS[:16])
    total = loss + gamma / 2 * gradient_norm_penalty(loss, weights)
    return torch.autograd.grad(total, weights)


def test_the_callback_trains_with_the_exact_penalty_and_the_learning_rate():
    # (lr / 4) ||g||^2 at learning rate 1 is gamma / 2 with gamma = 1 / 2.
    torch.testing.assert_close(step_of(GradientNormPenalty(1.0)), list(by_hand(0.5)))
    ours = step_of(GradientNormPenalty(0.25, with_learning_rate=False))
    torch.testing.assert_close(ours, list(by_hand(0.5)))


@pytest.mark.parametrize("difference", ["forward", "backward"])
@pytest.mark.parametrize("relative", [True, False])
def test_small_differences_train_as_the_exact_penalty(difference, relative):
    technique = FiniteDifferenceGradientRegularizer(
        0.5, epsilon=1e-5, difference=difference, relative=relative
    )
    for ours, expected in zip(step_of(technique), by_hand(0.5), strict=True):
        # The next order of the difference.
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("difference", "sign"), [("forward", 1), ("backward", -1)])
def test_a_large_step_goes_along_the_gradient_or_against_it(difference, sign):
    module = Host().double()
    weights = list(module.parameters())

    def gradient():
        loss = F.cross_entropy(module.net(INPUTS[:16].double()), LABELS[:16])
        return torch.autograd.grad(loss, weights)

    clean = gradient()
    with torch.no_grad():
        torch._foreach_add_(weights, list(clean), alpha=sign * 0.8)
    expected = [g + sign * 0.5 / 0.8 * (h - g) for g, h in zip(clean, gradient(), strict=True)]
    technique = FiniteDifferenceGradientRegularizer(0.5, epsilon=0.8, difference=difference)
    torch.testing.assert_close(step_of(technique), expected)


@pytest.mark.parametrize(
    "technique",
    [
        GradientNormPenalty(0.5, with_learning_rate=False),
        FiniteDifferenceGradientRegularizer(1.0, epsilon=0.1),
    ],
)
def test_training_ends_where_the_gradient_is_smaller(technique):
    def norm(module):
        weights = list(module.parameters())
        parts = []
        for rows in range(0, 64, 16):
            loss = F.cross_entropy(module.net(INPUTS[rows : rows + 16]), LABELS[rows : rows + 16])
            parts.append(gradient_norm_penalty(loss, weights).item())
        return sum(parts) / 4, loss.item()

    plain, _ = fit(max_epochs=30, module=Host(lr=0.05))
    ours, _ = fit([technique], max_epochs=30, module=Host(lr=0.05))
    # Measured: 0.59 and 0.46 of it.
    assert norm(ours)[0] < 0.75 * norm(plain)[0]
