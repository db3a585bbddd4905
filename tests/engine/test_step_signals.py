"""Signals that may be absent, and features in the type in which they were captured."""

import torch

from lightning_reg.engine import Regularizer
from tests.engine.simple import Host, fit


class Reads(Regularizer):
    """Keeps what it was asked to look up."""

    layers = ("net",)

    def __init__(self, look_up):
        super().__init__(1.0)
        self.look_up = look_up
        self.found = []

    def penalty(self, step):
        self.found.append(self.look_up(step))
        return step.logits.sum() * 0.0


def targets(step):
    return step.find("targets")


def both(step):
    return step.feature("net"), step.feature("net", as_captured=True)


class Unlabeled(Host):
    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0]


def test_a_signal_that_is_not_there_is_none():
    technique = Reads(targets)
    fit([technique], module=Unlabeled(), max_epochs=1)
    assert technique.found == [None] * 4


def test_a_signal_that_is_there_is_found():
    technique = Reads(targets)
    fit([technique], max_epochs=1)
    assert [len(found) for found in technique.found] == [16] * 4


def test_a_captured_feature_is_an_ancestor_of_the_loss_in_its_own_type():
    technique = Reads(both)
    fit([technique], max_epochs=1, precision="bf16-mixed")
    full, captured = technique.found[0]
    assert (full.dtype, captured.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(full, captured.float())
