"""The second network: where it starts, how it learns, whose random numbers it draws."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.engine import ArgumentError, UnsupportedError
from lightning_reg.engine.criterion import soft_cross_entropy
from lightning_reg.mechanisms.peer_network import PeerNetwork
from tests.engine.simple import INPUTS, Ascent, Host, fit, weights


class Beside(PeerNetwork):
    """Both networks learn the labels, each by itself."""

    needs = ("inputs", "logits", "targets")

    def __init__(self, strength=1.0, **settings):
        super().__init__(strength, **settings)
        self.looked = []

    def per_sample_loss(self, step, logits, distribution):
        said = self.answers(step)
        if self.looks and not step.is_rerun:
            self.looked.append((said.own_look, said.peer_look))
        peer = soft_cross_entropy(said.peer, distribution)
        return soft_cross_entropy(logits, distribution) + peer


class Watch(L.Callback):
    """Keeps both networks as they are when training starts."""

    def __init__(self, technique):
        self.technique = technique

    def on_train_start(self, trainer, pl_module):
        self.module = copy.deepcopy(pl_module)
        self.peer = copy.deepcopy(self.technique.peer)
        self.saved = set(pl_module.state_dict())


def train(technique, module, **settings):
    watch = Watch(technique)
    fit([technique, watch], module, **settings)
    return watch


def test_both_networks_train_as_each_would_alone():
    technique, module = Beside(), Host(batch_norm=True)
    watch = train(technique, module)
    for start, trained in ((Host(batch_norm=True), module), (watch.peer, technique.peer)):
        alone, _ = fit([], copy.deepcopy(start))
        torch.testing.assert_close(weights(trained), weights(alone), rtol=0, atol=1e-6)
        # Of BatchNorm as well: running mean, variance and count.
        pairs = zip(trained.named_buffers(), alone.named_buffers(), strict=True)
        for (name, mine), (_, theirs) in pairs:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=name)
    assert (weights(watch.peer) != weights(watch.module)[: len(weights(watch.peer))]).any()


def test_buffers_follow_the_module_to_another_type():
    technique = Beside()
    watch = train(technique, Host(batch_norm=True), precision="64-true")
    alone, _ = fit([], watch.peer, precision="64-true")
    pairs = zip(technique.peer.named_buffers(), alone.named_buffers(), strict=True)
    for (name, mine), (_, theirs) in pairs:
        torch.testing.assert_close(mine, theirs, msg=name)


def test_random_numbers_of_the_module_stay_its_own():
    module, _ = fit([Beside()], Host(dropout=0.5))
    alone, _ = fit([], Host(dropout=0.5))
    torch.testing.assert_close(weights(module), weights(alone), rtol=0, atol=1e-6)


def test_the_networks_draw_other_dropout_masks():
    module, logged = Host(dropout=0.5, lr=0.0), []

    class Compare(Beside):
        def per_sample_loss(self, step, logits, distribution):
            logged.append((self.answers(step).peer, logits))
            return super().per_sample_loss(step, logits, distribution)

    technique = Compare(peer=copy.deepcopy(module))
    fit([technique], module, max_epochs=1)
    # The same weights on the same batches.
    assert all((peer != own).any() for peer, own in logged)


def test_a_given_network_is_where_the_second_one_starts():
    given = Host()
    nn.init.constant_(given.net[0].weight, 0.25)
    technique = Beside(peer=given)
    watch = train(technique, Host())
    assert torch.equal(weights(watch.peer), weights(given))
    assert (weights(technique.peer) != weights(given)).any()


def test_a_second_pass_moves_no_buffer_again():
    module = Host(batch_norm=True, lr=0.0)
    alone, beside = Beside(), Beside()
    fit([alone], module)
    fit([beside, Ascent(0.05)], Host(batch_norm=True, lr=0.0))
    for (name, one), (_, two) in zip(
        alone.peer.named_buffers(), beside.peer.named_buffers(), strict=True
    ):
        assert torch.equal(one, two), name


def test_a_second_pass_sees_the_second_network_perturbed():
    # SAM's ascent on both networks is not what training without it gives.
    alone, beside = Beside(), Beside()
    fit([alone], Host())
    fit([beside, Ascent(0.5)], Host())
    assert (weights(alone.peer) - weights(beside.peer)).abs().max() > 1e-4


def test_the_second_network_is_no_part_of_the_modules_checkpoint():
    watch = train(Beside(), Host())
    assert watch.saved == set(Host().state_dict())


def test_the_module_learns_nothing_where_the_technique_is_off():
    technique, module = Beside(0.0), Host()
    fit([technique], module)
    alone, _ = fit([], Host())
    assert torch.equal(weights(module), weights(alone))
    assert technique.peer is None
    assert technique.state_dict() == {}


def test_looks_are_those_of_eval_mode():
    technique, module = Beside(looks=True), Host(dropout=0.5, lr=0.0)
    fit([technique], module, max_epochs=1)
    batch = INPUTS[:16]
    own, peer = technique.looked[0]
    with torch.no_grad():
        torch.testing.assert_close(own, module.eval()(batch))
        torch.testing.assert_close(peer, technique.peer.eval()(batch))


def test_looking_leaves_the_mode_and_the_training_alone():
    class Mode(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.modes = [part.training for part in pl_module.modules()]

    trained, modes = [], []
    for looks in (False, True):
        module, mode = Host(dropout=0.5), Mode()
        module.net[0].eval()
        # Half precision: its cache must not keep weights that were seen without a graph.
        fit([Beside(looks=looks), mode], module, precision="bf16-mixed")
        trained.append(weights(module))
        modes.append(mode.modes)
    assert torch.equal(*trained)
    assert modes[0] == modes[1]


def test_the_second_network_learns_under_mixed_precision():
    technique = Beside(looks=True)
    watch = train(technique, Host(), precision="bf16-mixed")
    assert (weights(technique.peer) - weights(watch.peer)).abs().max() > 1e-2


def test_prediction_is_the_mean_of_both():
    technique, module = Beside(), Host()
    fit([technique], module)
    found = technique.predict(module.eval(), INPUTS[:5])
    expected = (module(INPUTS[:5]) + technique.peer.eval()(INPUTS[:5])) / 2
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


# ---------------------------------------------------------------------- refusals


def test_an_optimizer_without_the_second_network_is_refused():
    class Partly(Host):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), 0.1)

    with pytest.raises(UnsupportedError, match=r"Beside.*net\.0\.weight.*self\.parameters\(\)"):
        fit([Beside()], Partly())


def test_frozen_weights_need_no_optimizer():
    class Frozen(Host):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

    class Head(Host):
        def configure_optimizers(self):
            head = [p for n, p in self.named_parameters() if "4" in n]
            return torch.optim.SGD(head, 0.1)

    for module in (Frozen(), Head()):
        technique = Beside()
        start = train(technique, module).peer
        torch.testing.assert_close(technique.peer.net[0].weight, start.net[0].weight)
        assert (technique.peer.net[4].weight != start.net[4].weight).any()


def test_a_module_without_forward_is_refused():
    class Silent(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 4)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(UnsupportedError, match=r"Beside.*no `forward`"):
        fit([Beside()], Silent())


def test_a_module_that_cannot_start_elsewhere_is_refused():
    class Bare(Host):
        def __init__(self):
            super().__init__()
            self.net = nn.Identity()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return x @ self.weight

    with pytest.raises(UnsupportedError, match=r"starts elsewhere.*peer=Module\(\)"):
        fit([Beside()], Bare())
    fit([Beside(peer=Bare())], Bare())


def test_a_given_network_of_another_kind_is_refused():
    with pytest.raises(ArgumentError, match=r"Beside.*other weights"):
        fit([Beside(peer=nn.Linear(8, 4))], Host())
