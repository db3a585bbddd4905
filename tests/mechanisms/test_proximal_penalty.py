"""Penalties that step or push: one or the other, and the same on every kind of layer."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.mechanisms.batches import in_batches
from lightning_reg.mechanisms.proximal_penalty import ProximalPenalty, soft_threshold
from tests.engine.simple import Host, fit, trainer


class Ridge(ProximalPenalty):
    """Half the squared norm of rows, so that the shape of the matrices shows."""

    shapes = ()

    def values(self, matrices):
        type(self).shapes = [tuple(m.shape) for m in matrices]
        return torch.stack([m.square().sum() / 2 for m in matrices])

    def closed_form(self, matrices):
        return self.values(matrices), list(matrices)

    def proximal_form(self, matrices, steps):
        return [m / (1 + t) for m, t in zip(matrices, steps, strict=True)]


def test_proximal_mode_adds_nothing_to_gradients_and_steps_once():
    module = Host(lr=0.1)
    plain, _ = fit(module=Host(lr=0.1), batch_size=64, max_epochs=1)
    fit([Ridge(0.5, mode="proximal")], module=module, batch_size=64, max_epochs=1)
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        expected = theirs.detach() / 1.05 if theirs.ndim > 1 else theirs.detach()
        torch.testing.assert_close(ours.detach(), expected)


@pytest.mark.parametrize("mode", ["gradient", "loss"])
def test_other_modes_take_no_step_after_the_optimizer(mode):
    ours, _ = fit([Ridge(0.5, mode=mode)], batch_size=64, max_epochs=1)
    plain, _ = fit(batch_size=64, max_epochs=1)
    for w, p, start in zip(ours.parameters(), plain.parameters(), Host().parameters(), strict=True):
        expected = p - 0.1 * 0.5 * start if p.ndim > 1 else p
        torch.testing.assert_close(w.detach(), expected.detach())


@pytest.mark.parametrize("mode", ["gradient", "loss", "proximal"])
def test_every_mode_logs_the_penalty_of_the_weights_before(mode):
    module = Host(lr=0.0)
    expected = sum(p.detach().square().sum() / 2 for p in module.parameters() if p.ndim > 1)
    _, run = fit([Ridge(0.5, mode=mode)], module=module, batch_size=64, max_epochs=1)
    assert run.callback_metrics["reg/ridge"] == pytest.approx(float(expected), rel=1e-6)


def test_transposed_convolutions_step_in_matrix_form():
    class Up(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)

        def training_step(self, batch, batch_idx):
            return self.up(batch[0]).square().mean() * 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1.0)

    module = Up()
    before = module.up.weight.detach().clone()
    data = DataLoader(TensorDataset(torch.randn(2, 4, 5, 5)), batch_size=2)
    trainer([Ridge(1.0, mode="proximal")], max_epochs=1).fit(module, data)
    assert Ridge.shapes == [(6, 18)]
    torch.testing.assert_close(module.up.weight.detach(), before / 2)


def test_unknown_mode_is_refused():
    with pytest.raises(ArgumentError, match="gradient, loss, proximal"):
        Ridge(0.1, mode="both")


def test_soft_threshold_shortens_by_the_threshold_of_each_tensor():
    found = soft_threshold([torch.tensor([2.0, -0.5, -3.0]), torch.tensor([0.5])], [1.0, 0.2])
    assert found[0].tolist() == [1.0, 0.0, -2.0]
    assert found[1].tolist() == [pytest.approx(0.3)]


def test_batches_keep_the_order_of_the_matrices():
    matrices = [torch.full((2, 3), 1.0), torch.full((1, 2), 2.0), torch.full((2, 3), 3.0)]
    values, results = in_batches(matrices, lambda stack: (stack.sum((1, 2)), 2 * stack))
    assert values.tolist() == [6.0, 4.0, 18.0]
    assert [r.flatten()[0].item() for r in results] == [2.0, 4.0, 6.0]
    assert [tuple(r.shape) for r in results] == [(2, 3), (1, 2), (2, 3)]
