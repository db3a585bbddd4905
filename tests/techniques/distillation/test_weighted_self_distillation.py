"""Generations: the closed forms of kernel ridge regression, and fits one after the other."""

import math

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import LinearSchedule, Mixup, WeightedSelfDistillation
from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.functional import (
    kernel_self_distillation,
    optimal_alpha,
    ridge_self_distillation,
    weighted_self_distillation,
)
from tests.engine.simple import INPUTS, Host, loader, trainer, weights

# Kennethborup/self_distillation@cb20d6c, toy_example.ipynb: targets at 0, 0.1, ..., 1, a Gaussian
# kernel with gamma 80, lambda 0.2; the error of each generation from sin(2 pi x).
POINTS = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]
TARGETS = torch.tensor(
    [
        0.38476636465198066,
        1.2333967683416893,
        1.33232242218057,
        0.69201594888895180,
        -0.29756145531871736,
        -0.24189291901377769,
        -0.7964485769175675,
        -0.9616480167034174,
        -0.49672509509916934,
        -0.3469066003991437,
        0.5589512650600734,
    ],
    dtype=torch.float64,
)[:, None]
OFFICIAL = {
    0.0: [0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251],
    0.25: [0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011],
}
LIMITS = {0.0: 0.49505, 0.25: 0.15250}


def _kernel(one, other):
    return torch.exp(-80 * torch.cdist(one, other).square())


def _errors(alpha, generations):
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    fits = kernel_self_distillation(
        _kernel(POINTS, POINTS), TARGETS, 0.2, [alpha] * (generations - 1)
    )
    predictions = _kernel(grid, POINTS) @ fits
    return (predictions - torch.sin(2 * math.pi * grid)).square().mean((1, 2))


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_official_errors_of_six_generations_and_of_the_limit(alpha):
    errors = _errors(alpha, 200)
    torch.testing.assert_close(
        errors[:6], torch.tensor(OFFICIAL[alpha], dtype=torch.float64), rtol=0, atol=6e-6
    )
    assert float(errors[-1]) == pytest.approx(LIMITS[alpha], abs=6e-6)


def test_infinite_generations_are_a_ridge_regression_with_more_regularization():
    kernel = _kernel(POINTS, POINTS)
    last = kernel_self_distillation(kernel, TARGETS, 0.5, [0.3] * 80)[-1]
    amplified = kernel_self_distillation(kernel, TARGETS, 0.5 / 0.3, [])[0]
    torch.testing.assert_close(last, amplified, rtol=1e-9, atol=1e-9)


def test_without_labels_each_direction_shrinks_by_its_own_factor():
    kernel = _kernel(POINTS, POINTS)
    values, vectors = np.linalg.eigh(kernel.numpy())
    fits = kernel @ kernel_self_distillation(kernel, TARGETS, 0.2, [0.0] * 4)
    for t, fit in enumerate(fits, start=1):
        expected = vectors @ np.diag((values / (values + 0.2)) ** t) @ vectors.T @ TARGETS.numpy()
        np.testing.assert_allclose(fit.numpy(), expected, atol=1e-12)


def test_linear_weights_minimize_the_weighted_objective():
    """By numpy, in the primal: (X^T X + lambda I)^-1 X^T (alpha y + (1 - alpha) f)."""
    x, y = INPUTS[:20].double(), INPUTS[20:40, :3].double()
    found = ridge_self_distillation(x, y, 0.7, [0.4, 0.9])
    a, b = x.numpy(), y.numpy()
    solve = np.linalg.inv(a.T @ a + 0.7 * np.eye(8)) @ a.T
    w = solve @ b
    for t, alpha in enumerate((None, 0.4, 0.9)):
        w = w if alpha is None else solve @ (alpha * b + (1 - alpha) * a @ w)
        np.testing.assert_allclose(found[t].numpy(), w, atol=1e-12)
    one = ridge_self_distillation(x, y[:, 0], 0.7, [0.4])
    torch.testing.assert_close(one, found[:2, :, 0])


def test_optimal_weight_is_the_best_of_a_grid():
    held_out = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)[:, None]
    truth = torch.sin(2 * math.pi * held_out)
    kernel, across = _kernel(POINTS, POINTS), _kernel(held_out, POINTS)
    alphas = []
    for _ in range(3):
        u, v = (
            across @ kernel_self_distillation(kernel, TARGETS, 0.02, [*alphas, a])[-1]
            for a in (1.0, 0.0)
        )
        best = float(optimal_alpha(truth, u, v))
        grid = np.linspace(best - 1, best + 1, 401)
        errors = [
            float(
                (across @ kernel_self_distillation(kernel, TARGETS, 0.02, [*alphas, a])[-1] - truth)
                .square()
                .mean()
            )
            for a in grid
        ]
        assert grid[int(np.argmin(errors))] == pytest.approx(best, abs=1e-9)
        alphas.append(best)
    assert len(set(alphas)) == 3


# ---------------------------------------------------------------------- fits


def _fit(technique, module=None, callbacks=(), data=None, **settings):
    module = module or Host()
    run = trainer([technique, *callbacks], **{"max_steps": 3, **settings})
    run.fit(module, data or loader())
    return module, run


def _by_hand(loss, steps=3):
    """The host after some steps on a loss of logits, inputs and labels."""
    module = Host()
    optimizer = module.configure_optimizers()
    for x, y in list(loader())[:steps]:
        optimizer.zero_grad()
        loss(module(x), x, y).backward()
        optimizer.step()
    return module


def test_second_fit_learns_from_labels_and_the_first_network():
    technique = WeightedSelfDistillation(0.4)
    first, _ = _fit(technique)
    assert (technique.generation, technique.alpha) == (1, 0.6)
    assert torch.equal(weights(first), weights(_by_hand(lambda z, x, y: F.cross_entropy(z, y))))
    second, _ = _fit(technique)

    def loss(z, x, y):
        past = first(x).detach().softmax(1)
        return F.cross_entropy(z, 0.6 * F.one_hot(y, 4) + 0.4 * past)

    torch.testing.assert_close(weights(second), weights(_by_hand(loss)), rtol=1e-5, atol=1e-6)
    assert technique.generation == 2
    torch.testing.assert_close(weights(technique.teacher.network), weights(second))


def test_squared_error_of_probabilities_as_in_the_official_code():
    technique = WeightedSelfDistillation(0.4, form="mse", replaces="loss")
    first, _ = _fit(technique)
    second, _ = _fit(technique)

    def loss(z, x, y):
        p, past = z.softmax(1), first(x).detach().softmax(1)
        return 0.6 * F.mse_loss(p, F.one_hot(y, 4).float()) + 0.4 * F.mse_loss(p, past)

    torch.testing.assert_close(weights(second), weights(_by_hand(loss)), rtol=1e-5, atol=1e-6)


class Regression(L.LightningModule):
    """A linear map of ``x`` by full-batch gradient descent with weight decay."""

    def __init__(self, ridge=0.7):
        super().__init__()
        self.map = torch.nn.Linear(8, 3, bias=False).double()
        torch.nn.init.zeros_(self.map.weight)
        self.ridge = ridge

    def forward(self, x):
        return self.map(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        # |f - y|^2 + lambda |w|^2, divided by the 40 * 3 numbers of the mean.
        decay = 2 * self.ridge / 120
        return torch.optim.SGD([self.map.weight], lr=1.0, weight_decay=decay, momentum=0.5)


def _regression_data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(80, 8, generator=generator).double()
    w = torch.randn(8, 3, generator=generator).double()
    noisy = x @ w + 0.6 * torch.randn(80, 3, generator=generator).double()
    train, held_out = (x[:40], noisy[:40]), (x[40:], noisy[40:])
    return train, held_out


def _regress(technique, **settings):
    train, held_out = _regression_data()
    module = Regression()
    run = trainer(
        [technique], max_epochs=120, num_sanity_val_steps=0, check_val_every_n_epoch=120, **settings
    )
    loaders = [DataLoader(TensorDataset(*d), batch_size=40) for d in (train, held_out)]
    run.fit(module, *loaders)
    return module.map.weight.detach().T


def test_generations_of_a_linear_network_are_those_of_ridge_regression():
    """And the weight that is chosen from validation data is the closed form's."""
    (x, y), (x_held, y_held) = _regression_data()
    technique = WeightedSelfDistillation(form="regression", optimal=True)
    first = _regress(technique)
    assert (technique.generation, technique.trial, technique.strength) == (1, True, 1.0)
    torch.testing.assert_close(first, ridge_self_distillation(x, y, 0.7, [])[-1], atol=1e-5, rtol=0)
    trial = _regress(technique)
    expected = ridge_self_distillation(x, y, 0.7, [0.0])[-1]
    torch.testing.assert_close(trial, expected, atol=1e-5, rtol=0)
    best = float(optimal_alpha(y_held, x_held @ first, x_held @ trial))
    assert (technique.generation, technique.trial) == (1, False)
    assert technique.alpha == pytest.approx(min(1.0, max(0.0, best)), abs=1e-4)
    assert 0 < technique.alpha < 1
    second = _regress(technique)
    expected = ridge_self_distillation(x, y, 0.7, [best])[-1]
    torch.testing.assert_close(second, expected, atol=1e-4, rtol=0)
    assert (technique.generation, technique.trial) == (2, True)
    trial = _regress(technique)
    # The fit to the labels is still the first one.
    best = float(optimal_alpha(y_held, x_held @ first, x_held @ trial))
    assert technique.alpha == pytest.approx(best, abs=1e-4)


def test_mixed_labels_are_mixed_before_the_teacher_softens_them():
    technique = WeightedSelfDistillation(0.4)
    first, _ = _fit(technique)
    seen = []

    class Watched(Mixup):
        def transform_batch(self, step):
            super().transform_batch(step)
            seen.append((step.inputs.clone(), *step.mixes[0], step.targets))

    second, _ = _fit(technique, callbacks=[Watched(1.0)], max_steps=1)
    x, permutation, lam, y = seen[0]
    lam = lam.float()[:, None]
    one_hot = F.one_hot(y, 4).float()
    labels = lam * one_hot + (1 - lam) * one_hot[permutation]
    host = Host()
    target = 0.6 * labels + 0.4 * first(x).detach().softmax(1)
    F.cross_entropy(host(x), target).backward()
    host.configure_optimizers().step()
    torch.testing.assert_close(weights(second), weights(host), rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_squared_error_from_the_mixture():
    f, y, g = (INPUTS[i : i + 4, :3].double() for i in (0, 4, 8))
    f.requires_grad_()
    (found,) = torch.autograd.grad(weighted_self_distillation(f, y, g, 0.3).sum(), f)
    mixture = 0.3 * y + 0.7 * g
    (expected,) = torch.autograd.grad((f - mixture).square().mean(1).sum(), f)
    torch.testing.assert_close(found, expected)


def test_the_best_weight_without_validation_data_is_refused():
    with pytest.raises(RegularizationError, match="this run has none"):
        _fit(WeightedSelfDistillation(optimal=True))
    with pytest.raises(ArgumentError, match="cannot be a Schedule"):
        WeightedSelfDistillation(LinearSchedule(0.0, 1.0), optimal=True)


def test_nothing_is_taken_from_weights_that_are_not_finite():
    class Broken(Host):
        def on_train_batch_end(self, *args):
            with torch.no_grad():
                self.net[0].weight.fill_(float("nan"))

    technique = WeightedSelfDistillation(0.4)
    with pytest.warns(UserWarning, match="weights are not finite"):
        _fit(technique, Broken(), max_steps=1)
    assert technique.generation == 0
