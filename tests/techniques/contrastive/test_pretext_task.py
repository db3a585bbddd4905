"""Pretext tasks: exact transforms, far permutations, and features that learn from them."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.contrastive.pretext_task import (
    PretextTaskMixin,
    jigsaw_permutations,
    jigsaw_pieces,
    pretext_task_loss,
    quarter_turns,
)
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import trainer


def test_turns_are_those_of_numpy_and_can_be_undone():
    images = torch.rand(8, 3, 5, 5)
    turns = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    turned = quarter_turns(images, turns)
    for image, k, found in zip(images, turns, turned, strict=True):
        assert np.array_equal(found.numpy(), np.rot90(image.numpy(), int(k), (1, 2)))
    assert torch.equal(quarter_turns(turned, (4 - turns) % 4), images)


def test_pieces_lie_where_the_order_says():
    image = torch.arange(49.0).view(1, 1, 7, 7)
    order = torch.tensor([[8, 0, 1, 2, 3, 4, 5, 6, 7]])
    pieces = jigsaw_pieces(image, order, 3)[0, :, 0]
    assert pieces.shape == (9, 2, 2)
    # The seventh row and column fill no piece.
    assert pieces[0].tolist() == [[32.0, 33.0], [39.0, 40.0]]
    assert pieces[1].tolist() == [[0.0, 1.0], [7.0, 8.0]]
    assert pieces[4].tolist() == [[14.0, 15.0], [21.0, 22.0]]


def _distances(permutations):
    different = (permutations[:, None] != permutations[None]).sum(-1)
    return different[~torch.eye(len(permutations), dtype=torch.bool)]


def test_permutations_are_farther_apart_than_those_of_the_official_file():
    """vkinakh/scatsimclr@7630b12, data/permutations_35.npy: two differ in 3 places at least."""
    permutations = jigsaw_permutations(35, 9)
    assert permutations.sort(1).values.eq(torch.arange(9)).all()
    assert permutations[0].tolist() == list(range(9))
    assert _distances(permutations).min().item() == 7
    assert torch.equal(permutations, jigsaw_permutations(35, 9))
    # All of them, where all are wanted; four that agree nowhere, where four are.
    assert len(jigsaw_permutations(24, 4).unique(dim=0)) == 24
    assert _distances(jigsaw_permutations(4, 4)).min().item() == 4


class Net(PretextTaskMixin, L.LightningModule):
    """A convolutional encoder that learns from a pretext task alone."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 32),
            nn.ReLU(),
        )
        self.shapes = []
        self.add_pretext_task(in_features=32, hidden=[64, 64], dropout=0.0, **settings)

    def encode(self, images):
        self.shapes.append(tuple(images.shape))
        return self.encoder(images)

    def training_step(self, batch, batch_idx):
        return self.pretext(torch.zeros(()), self.encode, batch[0])

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(parameters, 3e-3)


def _digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images = torch.tensor(x[order], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return images, torch.tensor(y[order])


def _loader(samples=64, batch_size=32):
    x, y = _digits()
    return DataLoader(TensorDataset(x[:samples], y[:samples]), batch_size=batch_size)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"turns": "all"}, (128, 1, 8, 8)),
        ({"turns": "one"}, (32, 1, 8, 8)),
        ({"task": "jigsaw", "grid": 2, "permutations": 24}, (128, 1, 8, 8)),
        ({"task": "jigsaw", "permutations": 5}, (288, 1, 8, 8)),
    ],
)
def test_encoder_sees_what_the_task_makes(settings, shape):
    module = Net(**settings)
    before = [p.detach().clone() for p in module.pretext_head.parameters()]
    trainer(max_epochs=1).fit(module, _loader())
    assert set(module.shapes) == {shape}
    assert all(
        not torch.equal(a, b) for a, b in zip(before, module.pretext_head.parameters(), strict=True)
    )


def test_random_draws_differ_between_steps_and_repeat_between_runs():
    def draws():
        seen = []

        class Watched(Net):
            def _rotation(self, encoder, images, turns):
                logits, labels = super()._rotation(encoder, images, turns)
                seen.append(labels)
                return logits, labels

        trainer(max_epochs=2).fit(Watched(turns="one"), _loader())
        return torch.stack(seen)

    first = draws()
    assert torch.equal(first, draws())
    assert len(first.unique(dim=0)) == 4
    assert set(first.unique().tolist()) == {0, 1, 2, 3}


def _on_rank():
    module = Net(turns="one")
    module.batches = []
    rank_trainer(max_epochs=1).fit(module, _loader())
    return module._generator().initial_seed()


def test_ranks_draw_for_themselves(ranks):
    one, other = ranks.run(_on_rank)
    assert one != other


def test_features_learn_to_tell_turns_of_images_that_were_held_out():
    """Measured: 0.93 of the turns, with 0.25 by chance."""
    x, y = _digits()
    module = Net(strength=1.0)
    trainer(max_epochs=20).fit(module, _loader(1000, 50))
    module.eval()
    # Digits that look like another one, or themselves, when turned are left out.
    test = x[1200:][~torch.isin(y[1200:], torch.tensor([0, 1, 6, 8, 9]))]
    labels = torch.arange(4).repeat_interleave(len(test))
    with torch.no_grad():
        logits = module.pretext_head(module.encoder(quarter_turns(test.repeat(4, 1, 1, 1), labels)))
    right = (logits.argmax(1) == labels).float().mean().item()
    assert right > 0.9


def test_in_evaluation_and_at_strength_0_the_loss_comes_back():
    loss, images = torch.tensor(2.0), torch.rand(4, 1, 8, 8)
    assert Net().eval().pretext(loss, None, images) is loss
    off = Net(strength=0.0)
    assert off.pretext(loss, None, images) is loss
    assert not any(p.requires_grad for p in off.pretext_head.parameters())


def test_loss_is_the_mean_log_probability_of_the_turns():
    logits = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = -torch.log(torch.softmax(logits, 1)[torch.arange(6), labels])
    torch.testing.assert_close(pretext_task_loss(logits, labels), expected)
    module, images = Net(strength=2.0), torch.rand(4, 1, 8, 8)
    found = module.pretext(torch.tensor(1.0), module.encoder, images)
    turned = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)])
    logits = module.pretext_head(module.encoder(turned))
    turns = torch.tensor([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4)
    torch.testing.assert_close(found, 1 + 2 * F.cross_entropy(logits, turns))


class Bare(PretextTaskMixin, L.LightningModule):
    """Has no head."""


def test_images_and_features_that_do_not_fit_are_named():
    for settings, images, problem in (
        ({}, torch.rand(2, 1, 8, 6), "square images"),
        ({"task": "jigsaw"}, torch.rand(2, 1, 2, 2), "3 x 3 pieces"),
    ):
        module = Net(**settings)
        with pytest.raises(ArgumentError, match=problem):
            module.pretext(torch.tensor(0.0), module.encoder, images)
    with pytest.raises(ArgumentError, match="for 32 features, and the encoder gives 64"):
        Net().pretext(torch.tensor(0.0), nn.Flatten(), torch.rand(2, 1, 8, 8))
    with pytest.raises(ArgumentError, match="without a pretext task"):
        Bare().pretext(torch.tensor(0.0), nn.Flatten(), torch.rand(2, 1, 8, 8))
