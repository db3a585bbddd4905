"""What tests of weight penalties share."""

import torch

from tests.engine.simple import Host


def matrix(rows=4, columns=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def check_closed_form(technique, weights):
    """Values and gradients of several weights at once against autograd, one by one."""
    values, gradients = technique.closed_form(weights)
    for w, value, gradient in zip(weights, values, gradients, strict=True):
        leaf = w.clone().requires_grad_()
        (expected,) = technique.values([leaf])
        (slope,) = torch.autograd.grad(expected, leaf)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, slope)


def check_proximal(technique, weight, step, value):
    """``prox`` is the minimum: no other point that we try is better, and near ones are worse.

    The objective is strongly convex, so a point that beats all others in every direction that is
    tried, at small and at large distances, is its minimum.
    """
    (found,) = technique.proximal_form([weight], [step])

    def objective(u):
        return float((u - weight).square().sum() / 2 + step * value(u))

    best = objective(found)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            direction = torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
            # Along the weight too, and within its zeros, where kinks are.
            for move in (direction, direction * (found != 0), found * direction[0, 0]):
                assert objective(found + size * move) >= best - 1e-12
    assert best < objective(weight)
    return found


class Still(Host):
    """Trains nothing by itself: what moves the weights is the penalty."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
