"""Hooks that do nothing are hidden while training runs, and only those."""

import copy

import lightning as L

from tests.engine.simple import Ascent, Confidence, fit


class Listening(Confidence):
    heard = 0

    def on_before_zero_grad(self, *args):
        self.heard += 1


class Watch(L.Callback):
    def __init__(self, techniques):
        self.techniques = techniques
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = [
            {k for k, v in vars(t).items() if k.startswith("on_") and v is None}
            for t in self.techniques
        ]
        self.copied = copy.deepcopy(self.techniques[1])


def test_only_inherited_hooks_of_followers_are_hidden_and_come_back():
    leader, follower, listening = Confidence(0.1), Ascent(0.05), Listening(0.1, name="second")
    watch = Watch([leader, follower, listening])
    fit([leader, follower, listening, watch])
    assert watch.seen[0] == {"on_before_zero_grad", "on_before_backward"}
    assert "on_train_batch_end" in watch.seen[1]
    assert "on_before_zero_grad" not in watch.seen[2]
    assert listening.heard == 8
    assert callable(watch.copied.on_train_batch_end)
    for technique in (leader, follower, listening):
        assert not any(key.startswith("on_") for key in vars(technique))
