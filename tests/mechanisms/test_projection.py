"""Projections and proximal steps: after each optimizer step, with any optimizer."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from lightning_reg.engine import ArgumentError
from lightning_reg.mechanisms.projection import Projection, ProximalStep
from tests.engine.simple import INPUTS, LABELS, Host, fit, weights


class Box(Projection):
    """Entries in [-0.1, 0.1]."""

    def project_weights(self, update, weights):
        inside = [w.clamp(-0.1, 0.1) for w in weights.values()]
        return inside, torch.stack([w.abs().max() for w in weights.values()]).max()


class Lasso(ProximalStep):
    """Soft thresholding."""

    def proximal(self, weights, steps):
        moved = [
            w.sign() * (w.abs() - t).clamp_min(0)
            for w, t in zip(weights.values(), steps, strict=True)
        ]
        return moved, None


class Watch(Callback):
    def __init__(self):
        self.largest = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        kernels = [p for p in pl_module.parameters() if p.ndim > 1]
        self.largest.append(max(float(k.detach().abs().max()) for k in kernels))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
}


def host(kind):
    class Optimized(Host):
        def configure_optimizers(self):
            return OPTIMIZERS[kind](self.parameters())

    return Optimized()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_obey_after_every_step(kind):
    watch = Watch()
    fit([Box(), watch], module=host(kind))
    assert len(watch.largest) == 8
    assert max(watch.largest) == pytest.approx(0.1)


def test_nothing_is_projected_between_optimizer_steps():
    watch = Watch()
    fit([Box(), watch], accumulate_grad_batches=4, max_epochs=1)
    assert [largest > 0.1 + 1e-6 for largest in watch.largest] == [True, True, True, False]


def test_strength_is_the_share_of_the_way():
    module = Host(lr=0.0)
    before = module.net[4].weight.detach().clone()
    fit([Box(0.25)], module=module, batch_size=64, max_epochs=1)
    expected = before + 0.25 * (before.clamp(-0.1, 0.1) - before)
    torch.testing.assert_close(module.net[4].weight.detach(), expected)


def test_value_is_logged_for_the_weights_before_the_projection():
    module = Host(lr=0.0)
    largest = max(float(p.detach().abs().max()) for p in module.parameters() if p.ndim > 1)
    _, run = fit([Box()], module=module, batch_size=64, max_epochs=1)
    assert run.callback_metrics["reg/box"] == pytest.approx(largest)


def test_proximal_step_uses_the_rate_of_its_own_step():
    # The scheduler moves on before the projection runs.
    class Decaying(Host):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.2)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module, _ = fit([Lasso(0.1)], module=Decaying(), max_epochs=1)
    plain, rate = Host(), 0.2
    for x, y in zip(INPUTS.split(16), LABELS.split(16), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(plain(x), y), list(plain.parameters()))
        with torch.no_grad():
            for p, g in zip(plain.parameters(), gradients, strict=True):
                p -= rate * g
                if p.ndim > 1:
                    p.copy_(F.softshrink(p, rate * 0.1))
        rate /= 2
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


def test_share_outside_the_unit_interval_is_refused():
    with pytest.raises(ArgumentError, match="Box"):
        Box(1.5)
