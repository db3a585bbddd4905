"""Masked weights: exact zeros whatever the optimizer does, and masks that last."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_reg.engine import Regularizer
from lightning_reg.mechanisms.masked_weights import MaskedWeights
from tests.engine.simple import INPUTS, LABELS, Host, fit, loader, trainer, weights


class Coins(MaskedWeights):
    """A fair coin for each weight."""

    draws = 0

    def masks(self, weights, module, generator):
        type(self).draws += 1
        return {n: torch.rand(w.shape, generator=generator) < 0.5 for n, w in weights.items()}


class Noise(Regularizer):
    """A gradient on every weight, after the masks."""

    reads = frozenset({"gradients"})

    def edit_gradients(self, update):
        for parameter in update.module.parameters():
            parameter.grad += 1


class Watch(Callback):
    def __init__(self, technique):
        self.technique = technique
        self.alive, self.momentum = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        named = dict(pl_module.named_parameters())
        state = trainer.optimizers[0].state
        for name, mask in self.technique._masks.items():
            self.alive.append(int((named[name].detach()[~mask] != 0).sum()))
            for value in state[named[name]].values():
                if value is not None and value.ndim:
                    self.momentum.append(float(value[~mask].abs().max()))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
}


def host(kind, base=Host):
    class Optimized(base):
        def configure_optimizers(self):
            return OPTIMIZERS[kind](self.parameters())

    return Optimized()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_weights_are_zero_and_without_momentum_after_every_step(kind):
    technique = Coins()
    watch = Watch(technique)
    module, _ = fit([technique, watch], module=host(kind))
    assert len(watch.alive) == 16
    assert max(watch.alive) == 0
    assert max(watch.momentum) == 0
    assert (module.net[4].weight == 0).float().mean() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradients_of_other_techniques_do_not_wake_masked_weights(kind):
    technique = Coins()
    watch = Watch(technique)
    fit([Noise(), technique, watch], module=host(kind))
    assert max(watch.momentum) > 0
    assert max(watch.alive) == 0


def test_equals_a_network_that_multiplies_by_its_masks():
    technique = Coins()
    module, _ = fit([technique], module=host("sgd"))
    masks = [technique._masks["net.0.weight"], technique._masks["net.4.weight"]]
    plain = Host()
    with torch.no_grad():
        for layer, mask in zip((plain.net[0], plain.net[4]), masks, strict=True):
            layer.weight *= mask
    optimizer = OPTIMIZERS["sgd"](plain.parameters())
    for _ in range(2):
        for x, y in zip(INPUTS.split(16), LABELS.split(16), strict=True):
            optimizer.zero_grad()
            hidden = F.relu(F.linear(x, plain.net[0].weight * masks[0], plain.net[0].bias))
            logits = F.linear(hidden, plain.net[4].weight * masks[1], plain.net[4].bias)
            F.cross_entropy(logits, y).backward()
            optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


class Tied(Host):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
        self.net[1].weight = self.net[0].weight


def test_tied_weights_share_a_mask():
    technique = Coins()
    watch = Watch(technique)
    fit([technique, watch], module=host("adamw", Tied))
    assert sorted(technique._masks) == ["net.0.weight", "net.2.weight"]
    assert max(watch.alive) == 0


def test_resume_takes_the_masks_of_the_checkpoint(tmp_path):
    first = Coins()
    _, run = fit([first], max_epochs=1)
    run.save_checkpoint(tmp_path / "end.ckpt")
    resumed = Coins()
    before = Coins.draws
    trainer([resumed], max_epochs=2).fit(
        Host(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    assert Coins.draws == before
    for name, mask in first._masks.items():
        assert torch.equal(resumed._masks[name], mask)


def test_second_fit_keeps_masks_and_another_module_gets_its_own():
    technique = Coins()
    module, _ = fit([technique], max_epochs=1)
    before = Coins.draws
    fit([technique], module=module, max_epochs=1)
    assert Coins.draws == before
    fit([technique], module=Host(), max_epochs=1)
    assert Coins.draws == before + 1


def test_names_have_streams_of_their_own():
    one, other = Coins(), Coins(name="other")
    fit([one], max_epochs=1)
    fit([other], max_epochs=1)
    assert not torch.equal(one._masks["net.0.weight"], other._masks["net.0.weight"])
