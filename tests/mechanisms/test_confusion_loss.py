"""Soft confusion counts: layouts, tasks, regions, ignored positions, classes, mixed labels."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.mechanisms.confusion_loss import ConfusionLoss
from lightning_reg.techniques.inputs.mixup import Mixup
from tests.engine.simple import INPUTS, LABELS, Host, fit

CHOSEN = LABELS[:16]


class Counting(ConfusionLoss):
    """Keeps the counts; its value is the mean of what was predicted."""

    def __init__(self, strength=1.0, **kwargs):
        super().__init__(strength, **kwargs)
        self.seen = []

    def losses(self, counts):
        self.seen.append(counts)
        return counts.predicted - counts.both


class Layout(Host):
    """Returns logits and targets of a chosen layout."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        changed, targets = self.change(logits, batch[1])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": changed, "targets": targets}


def counts(change, **kwargs):
    """The counts of the first step, and the value that was logged."""
    ours = Counting(**kwargs)
    _, run = fit([ours], module=Layout(change), max_epochs=1, limit_train_batches=1)
    return ours.seen[0], run.logged_metrics["reg/counting"].item()


def logits():
    return Host()(INPUTS[:16]).detach()


@pytest.mark.parametrize(
    "change",
    [
        lambda z, y: (z, y),
        lambda z, y: (z, F.one_hot(y, 4).float()),
        lambda z, y: (z.view(4, 4, 4), y.view(4, 4)),
        lambda z, y: (z.view(2, 4, 2, 4).movedim(-1, 1), y.view(2, 4, 2)),
        lambda z, y: (
            z.view(8, 2, 4).movedim(-1, 1),
            F.one_hot(y.view(8, 2), 4).movedim(-1, 1).float(),
        ),
    ],
)
def test_every_layout_gives_the_same_counts_of_the_batch(change):
    found, _ = counts(change, over="batch")
    p, y = logits().softmax(1), F.one_hot(CHOSEN, 4).float()
    torch.testing.assert_close(found.both, (p * y).sum(0))
    torch.testing.assert_close(found.predicted, p.sum(0))
    torch.testing.assert_close(found.labelled, y.sum(0))
    torch.testing.assert_close(found.positions, torch.full((4,), 16.0))


@pytest.mark.parametrize(
    "change",
    [
        lambda z, y: (z[:, :1], (y > 1).long()),
        lambda z, y: (z[:, 0], (y > 1).float()),
        lambda z, y: (z[:, :1].view(4, 1, 2, 2), (y > 1).float().view(4, 1, 2, 2)),
        lambda z, y: (z[:, :1].view(4, 1, 2, 2), (y > 1).float().view(4, 2, 2)),
    ],
)
def test_one_class_is_a_binary_task(change):
    found, _ = counts(change, over="batch", task="multilabel")
    p, y = logits()[:, :1].sigmoid(), (CHOSEN > 1).float().unsqueeze(1)
    torch.testing.assert_close(found.both, (p * y).sum(0))
    torch.testing.assert_close(found.predicted, p.sum(0))


def test_images_have_their_own_counts():
    found, value = counts(lambda z, y: (z.view(4, 4, 4), y.view(4, 4)), over="image")
    p = logits().softmax(1).view(4, 4, 4)
    y = F.one_hot(CHOSEN, 4).view(4, 4, 4)
    torch.testing.assert_close(found.predicted, p.sum(1))
    assert value == pytest.approx((p * (1 - y)).sum(1).mean().item(), rel=1e-5)


def test_positions_have_their_own_counts():
    found, value = counts(lambda z, y: (z.view(4, 4, 4), y.view(4, 4)), over="position")
    assert found.both.shape == (4, 4, 4)
    p, y = logits().softmax(1), F.one_hot(CHOSEN, 4)
    assert value == pytest.approx((p * (1 - y)).mean().item(), rel=1e-5)


@pytest.mark.parametrize("over", ["position", "image", "batch"])
def test_ignored_positions_add_nothing(over):
    where = torch.arange(16) % 4 == 0

    def change(z, y):
        # Whole images of them, too.
        return z.view(8, 2, 4), torch.where(where | (torch.arange(16) < 2), 9, y).view(8, 2)

    kept = ~(where | (torch.arange(16) < 2))
    found, value = counts(change, over=over, ignore_index=9)
    p, y = logits().softmax(1)[kept], F.one_hot(CHOSEN[kept], 4)
    wrong = p * (1 - y)
    assert found.positions.sum() == 4 * kept.sum()
    expected = {
        "position": wrong.mean(),
        "image": wrong.sum() / (7 * 4),
        "batch": wrong.sum(0).mean(),
    }[over]
    assert value == pytest.approx(expected.item(), rel=1e-5)


def test_ignored_labels_of_single_classes_add_nothing():
    y = F.one_hot(CHOSEN, 4)
    marked = y.clone()
    marked[3, 2] = -100
    found, _ = counts(lambda z, _: (z, marked), over="batch", task="multilabel")
    assert found.positions.tolist() == [16, 16, 15, 16]
    p = logits().sigmoid()
    torch.testing.assert_close(found.predicted[2], p[:, 2].sum() - p[3, 2])


def test_only_chosen_classes_count():
    _, value = counts(lambda z, y: (z, y), over="batch", classes=[1, 3])
    p, y = logits().softmax(1), F.one_hot(CHOSEN, 4)
    assert value == pytest.approx((p * (1 - y)).sum(0)[[1, 3]].mean().item(), rel=1e-5)


@pytest.mark.parametrize("over", ["image", "batch"])
def test_absent_classes_can_be_left_out(over):
    def change(z, y):
        return z.view(4, 4, 4), (y % 2).view(4, 4)

    _, value = counts(change, over=over, present_only=True)
    p = logits().softmax(1).view(4, 4, 4)
    y = F.one_hot(CHOSEN % 2, 4).view(4, 4, 4)
    wrong, present = (p * (1 - y)).sum(1), y.sum(1) > 0
    if over == "batch":
        wrong, present = wrong.sum(0), present.any(0)
    assert value == pytest.approx(wrong[present].mean().item(), rel=1e-5)


def test_labels_of_mixed_samples_are_mixed():
    ours = Counting(over="position")
    fit([ours, Mixup(alpha=1.0, per="sample")], max_epochs=1, limit_train_batches=1)
    labels = ours.seen[0].labelled
    torch.testing.assert_close(labels.sum(-1), torch.ones(16, 1))
    assert ((labels > 0.05) & (labels < 0.95)).any()


def test_a_softmax_over_one_class_is_refused():
    with pytest.raises(RegularizationError, match='task="multilabel"'):
        counts(lambda z, y: (z[:, :1], y))


def test_labels_of_another_shape_are_refused():
    with pytest.raises(RegularizationError, match="multilabel"):
        counts(lambda z, y: (z, y), task="multilabel")


def test_a_class_that_is_not_there_is_refused():
    with pytest.raises(ArgumentError, match="4 classes"):
        counts(lambda z, y: (z, y), classes=[4])
