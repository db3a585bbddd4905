"""Penalties on logits and labels: layouts, ignored positions, soft and mixed labels, ranks."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine import RegularizationError
from lightning_reg.mechanisms.labeled_output_penalty import (
    LabeledOutputPenalty,
    confidence_and_correctness,
)
from lightning_reg.techniques.inputs.mixup import Mixup
from tests.engine.simple import INPUTS, LABELS, Host, fit


class Seen(LabeledOutputPenalty):
    """Keeps what it was given."""

    def __init__(self, strength=1.0, **kwargs):
        super().__init__(strength, **kwargs)
        self.seen = []

    def value(self, step, logits, distribution):
        self.seen.append((logits.detach().clone(), distribution.clone()))
        return logits.mean()


class Layout(Host):
    """Returns logits and targets of a chosen layout."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        changed, targets = self.change(logits, batch[1])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": changed, "targets": targets}


def seen(change, **kwargs):
    ours = Seen(**kwargs)
    fit([ours], module=Layout(change), max_epochs=1)
    return ours.seen[0]


def plain():
    return Host()(INPUTS[:16]).detach(), F.one_hot(LABELS[:16], 4).float()


@pytest.mark.parametrize(
    "change",
    [
        lambda z, y: (z, y),
        lambda z, y: (z, F.one_hot(y, 4).float()),
        lambda z, y: (z.view(4, 4, 4), y.view(4, 4)),
        lambda z, y: (z.view(8, 2, 4).movedim(-1, 1), y.view(8, 2)),
        lambda z, y: (
            z.view(8, 2, 4).movedim(-1, 1),
            F.one_hot(y.view(8, 2), 4).movedim(-1, 1).float(),
        ),
    ],
)
def test_every_layout_gives_the_same_rows(change):
    for found, expected in zip(seen(change), plain(), strict=True):
        torch.testing.assert_close(found, expected)


def test_ignored_positions_are_left_out():
    def change(z, y):
        return z, torch.where(torch.arange(16) % 4 == 0, 9, y)

    kept = torch.arange(16) % 4 != 0
    for found, expected in zip(seen(change, ignore_index=9), plain(), strict=True):
        torch.testing.assert_close(found, expected[kept])


def test_labels_of_mixed_samples_are_mixed():
    ours = Seen()
    fit([ours, Mixup(alpha=1.0)], max_epochs=1)
    _, distribution = ours.seen[0]
    torch.testing.assert_close(distribution.sum(1), torch.ones(16))
    assert (distribution.max(1).values < 1).any()


def test_targets_that_do_not_belong_are_an_error():
    with pytest.raises(RegularizationError, match="not those of one classification"):
        seen(lambda z, y: (z, y[:8]))
    with pytest.raises(RegularizationError, match="not those of one classification"):
        seen(lambda z, y: (z, y.float()))


def test_correctness_is_the_labels_mass_on_the_most_likely_class():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], requires_grad=True)
    soft = torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    confidence, correctness = confidence_and_correctness(logits, soft)
    torch.testing.assert_close(confidence, logits.softmax(1).amax(1))
    assert correctness.tolist() == pytest.approx([0.6, 0.0])
    assert confidence.requires_grad
    assert not correctness.requires_grad
