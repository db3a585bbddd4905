"""What every change of a batch is owed: streams, copies, labels, logs and refusals."""

from typing import NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.engine import MissingSignalError, RegularizationError, Signals
from lightning_reg.engine.schedule import StepSchedule
from lightning_reg.mechanisms.batch_transform import (
    BatchTransform,
    Transformed,
    box_areas,
    box_masks,
    clipped_boxes,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import CLASSES, INPUTS, LABELS, Ascent, Host, fit, trainer
from tests.hosts.loaders import Batches


class Rotate(BatchTransform):
    """Gives every sample half of its neighbour."""

    def transform(self, inputs, chosen, generator, step):
        partner = torch.arange(len(inputs)).roll(1)
        lam = torch.full((len(inputs),), 0.5)
        return Transformed((inputs + inputs[partner]) / 2, 0.5, partner, lam)


class Noise(BatchTransform):
    """Adds a draw to the inputs; labels stay."""

    needs = ("inputs",)
    exclusive = frozenset()

    def transform(self, inputs, chosen, generator, step):
        drawn = torch.randn(len(inputs), generator=generator)
        return Transformed(inputs + torch.where(chosen, drawn, 0.0)[:, None], 0.0)


class Seen(Host):
    """Keeps what its step gets."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)


def test_the_loaders_own_batch_stays_as_it_was():
    batch = [INPUTS.clone(), LABELS.clone()]
    module = Seen(lr=0.0)
    trainer([Rotate()], max_epochs=1).fit(module, Batches(batch))
    assert torch.equal(batch[0], INPUTS)
    torch.testing.assert_close(module.batches[0][0], (INPUTS + INPUTS.roll(1, 0)) / 2)


def test_class_labels_stay_in_the_batch_and_the_logged_loss_is_the_users():
    module = Seen(lr=0.0)
    _, run = fit([Rotate()], module=module, max_epochs=1, batch_size=64)
    x, y = module.batches[0]
    assert torch.equal(y, LABELS)
    torch.testing.assert_close(run.callback_metrics["loss"], F.cross_entropy(module(x), y))
    assert run.callback_metrics["reg/rotate"] == 0.5


def test_a_second_pass_sees_the_same_mix():
    module = Seen(lr=0.0)
    fit([Noise(), Ascent(0.1)], module=module, max_epochs=1, batch_size=64)
    first, *others = (x for x, _ in module.batches)
    assert not torch.equal(first, INPUTS)
    assert len(others) == 2
    assert all(torch.equal(first, other) for other in others)


def test_two_techniques_of_one_class_draw_from_streams_of_their_own():
    def drawn(name):
        module = Seen(lr=0.0)
        fit([Noise(name=name)], module=module, max_epochs=1, batch_size=64)
        return module.batches[0][0] - INPUTS

    assert torch.equal(drawn("one"), drawn("one"))
    assert not torch.equal(drawn("one"), drawn("two"))


def test_the_users_random_numbers_are_not_touched():
    def dropped(callbacks):
        module = Host(dropout=0.5, lr=0.0)
        torch.manual_seed(3)
        _, run = fit(callbacks, module=module, max_epochs=1)
        return torch.rand(1), run

    assert torch.equal(dropped([])[0], dropped([Noise(), Rotate()])[0])


def test_with_one_draw_a_sample_the_probability_is_the_share_of_samples():
    module = Seen(lr=0.0)
    technique = Noise(0.3, per="sample")
    fit([technique], module=module, max_epochs=30, batch_size=64)
    changed = torch.stack([(x != INPUTS).any(1) for x, _ in module.batches]).float()
    # 1920 draws: a standard error of 0.011.
    assert abs(float(changed.mean()) - 0.3) < 0.04


def test_a_probability_may_follow_a_schedule():
    module = Seen(lr=0.0)
    schedule = StepSchedule([0.0, 1.0], [1], by="epoch")
    fit([Noise(schedule)], module=module, max_epochs=2, batch_size=64)
    before, after = (x for x, _ in module.batches)
    assert torch.equal(before, INPUTS)
    assert not torch.equal(after, INPUTS)


class Named(NamedTuple):
    features: torch.Tensor
    label: torch.Tensor


class AnyBatch(L.LightningModule):
    """Keeps the batch, and returns a loss that needs nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch):
        self.seen = batch
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("batch", "read", "signals"),
    [
        ({"x": INPUTS, "y": LABELS}, lambda b: b["x"], None),
        (Named(INPUTS, LABELS), lambda b: b.features, None),
        (INPUTS, lambda b: b, None),
        ({"deep": {"a": [INPUTS]}}, lambda b: b["deep"]["a"][0], Signals(inputs="batch.deep.a.0")),
    ],
)
def test_batches_of_any_make_keep_it(batch, read, signals):
    module = AnyBatch()
    trainer([Noise(signals=signals)], max_epochs=1).fit(module, Batches(batch))
    assert type(module.seen) is type(batch)
    assert not torch.equal(read(module.seen), INPUTS)
    assert torch.equal(read(batch), INPUTS)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [(torch.zeros(4, 3, dtype=torch.long), "floating-point"), ([INPUTS, INPUTS], "one tensor")],
)
def test_inputs_that_cannot_be_changed_are_refused(inputs, reason):
    with pytest.raises(RegularizationError, match=reason):
        trainer([Noise()], max_epochs=1).fit(AnyBatch(), Batches((inputs, LABELS[:4])))


def test_vectors_are_refused_where_images_are_needed():
    class OnImages(Noise):
        image = True

    with pytest.raises(RegularizationError, match=r"images \(B, C, H, W\)"):
        fit([OnImages()])


def test_inputs_that_are_not_in_the_batch_are_named():
    with pytest.raises(MissingSignalError, match="Noise: needs `inputs`"):
        trainer([Noise()], max_epochs=1).fit(AnyBatch(), Batches({"first": INPUTS}))


def test_manual_optimization_without_regularize_is_told_that_labels_are_not_mixed():
    class Manual(Host):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(x), y))
            optimizer.step()

    with pytest.raises(RegularizationError, match="mixed their labels") as error:
        fit([Rotate()], module=Manual(), max_epochs=1)
    assert "self.regularize" in error.value.cure


def test_boxes_are_cut_off_at_the_borders_and_masks_and_areas_agree():
    centres = torch.tensor([[0, 0], [3, 5], [2, 2]])
    boxes = clipped_boxes(centres, 2, 1, 4, 6)
    assert boxes.tolist() == [[0, 0, 1, 1], [1, 3, 4, 6], [0, 0, 3, 3]]
    masks = box_masks(boxes, 4, 6)
    assert masks.shape == (3, 4, 6)
    assert masks.sum((1, 2)).tolist() == box_areas(boxes).tolist() == [1, 9, 9]
    assert masks[1, 1:, 3:].all()


def draws_alone() -> list[float]:
    module = Seen(lr=0.0)
    batch = (torch.zeros(CLASSES, 8), torch.zeros(CLASSES, dtype=torch.long))
    rank_trainer(callbacks=[Noise()], max_epochs=1).fit(module, Batches(batch))
    return module.batches[0][0][:, 0].tolist()


def test_ranks_draw_differently(ranks):
    one, other = ranks.run(draws_alone)
    assert one != other
