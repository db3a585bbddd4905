"""RePRI: predictions of the official code, and what each term is there for."""

import math

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_reg import RePRIMixin
from lightning_reg.engine import ArgumentError
from lightning_reg.functional import repri, repri_regularizer


def fixed(*shape):
    """Numbers that need no generator."""
    return (torch.arange(math.prod(shape), dtype=torch.float64).view(shape) * 1.7).sin() * 3


def official_task():
    """Two tasks of two support images and one query, 5 features, 3 x 4 pixels."""
    support, query = fixed(2, 2, 5, 3, 4), (fixed(2, 1, 5, 3, 4) * 1.3 + 0.2).roll(3, -1)
    labels = (fixed(2, 2, 3, 4) > 0.5).long()
    labels[0, 0, 0, 0] = 255
    valid = torch.ones(2, 1, 3, 4)
    valid[0, 0, 1, 1] = 0
    return support, labels, query, valid


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [
        (1, [[0.0013515565, 0.7412656751], [0.0251401160, 0.9991161844]]),
        (5, [[0.0013241001, 0.7450721411], [0.0215522292, 0.9992289262]]),
        (50, [[0.0010911861, 0.7787136722], [0.0061948326, 0.9997349910]]),
    ],
)
def test_predictions_are_those_of_the_official_code(iterations, expected):
    # mboudiaf/RePRI-for-Few-Shot-Segmentation@aa54b19, src/classifier.py, with its defaults, in
    # float64; pixels 1 and 3 of the first task, 0 and 2 of the second.
    p = repri(*official_task(), iterations=iterations).sigmoid().flatten(1)
    found = [p[0, [1, 3]].tolist(), p[1, [0, 2]].tolist()]
    assert found == [pytest.approx(row, abs=1e-8) for row in expected]


def test_the_regularizer_has_the_official_value_and_gradient():
    # As above, get_entropies, with 1/2 of the entropy and 2 of the divergence from 0.3.
    z = fixed(1, 8).requires_grad_()
    valid = torch.ones(1, 8).double()
    valid[0, 0] = 0
    value = 0.5 * repri_regularizer(z, valid, torch.tensor([0.3]).double(), 4.0)
    assert value.item() == pytest.approx(2 * 0.06492587302754746 + 0.5 * 0.36420368408693476)
    official = [0.0, -0.0001199915, 0.0573225060, 0.0225077273, 0.0156887036]
    assert torch.autograd.grad(value, z)[0][0, :5].tolist() == pytest.approx(official, abs=1e-9)


def test_the_estimate_comes_first_in_the_divergence():
    z = torch.full((1, 4), math.log(0.9 / 0.1)).double()
    both = repri_regularizer(z, torch.ones_like(z), torch.tensor([0.5]).double(), 1.0)
    entropy = repri_regularizer(z, torch.ones_like(z), torch.tensor([0.5]).double(), 0.0)
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert (both - entropy).item() == pytest.approx(expected, abs=1e-8)


def shifted_task(seed, share=0.3):
    """A query whose features are all moved towards the background, and its labels."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(8, generator=generator)

    def image(shift, share):
        mask = (torch.rand(20, 20, generator=generator) < share).long()
        noise = torch.randn(8, 20, 20, generator=generator)
        return noise + direction[:, None, None] * (1.2 * mask - shift), mask

    support, labels = image(0.0, 0.5)
    query, truth = image(0.8, share)
    return support[None, None], labels[None, None], query[None, None], truth


def overlap(logits, truth):
    chosen = logits[0, 0] > 0
    return float((chosen & (truth == 1)).sum() / (chosen | (truth == 1)).sum())


def test_entropy_alone_loses_the_foreground_and_the_divergence_keeps_it():
    settings = {"iterations": 200, "lr": 1.0, "temperature": 5.0, "update_at": ()}
    for seed in range(3):
        *task, truth = shifted_task(seed)
        share = truth.float().mean().view(1)
        alone = repri(*task, **settings, divergence_weight=0.0, entropy_weight=20.0)
        both = repri(
            *task, **settings, proportion=share, divergence_weight=20.0, entropy_weight=1.0
        )
        assert abs((alone > 0).float().mean() - share) > 0.15
        assert abs((both > 0).float().mean() - share) < 0.1
        assert overlap(both, truth) > overlap(alone, truth)


def test_the_true_share_beats_a_wrong_one():
    for seed in range(3):
        *task, truth = shifted_task(seed, share=0.2)
        share = truth.float().mean().view(1)
        settings = {"temperature": 5.0, "lr": 1.0, "iterations": 200, "divergence_weight": 20.0}
        true = repri(*task, **settings, proportion=share)
        wrong = repri(*task, **settings, proportion=torch.tensor([0.5]))
        assert overlap(true, truth) > overlap(wrong, truth) + 0.05


def test_tasks_do_not_see_each_other():
    support, labels, query, valid = official_task()
    joint = repri(support, labels, query, valid)
    alone = repri(support[:1], labels[:1], query[:1], valid[:1])
    torch.testing.assert_close(joint[:1], alone)


class Tested(RePRIMixin, L.LightningModule):
    """Calls it where the Trainer is in inference mode, with labels of another resolution."""

    def __init__(self):
        super().__init__()
        self.set_repri(iterations=5)
        self.encoder = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.seen = []

    def test_step(self, batch, batch_idx):
        support, labels, query, valid, share = batch
        features = [
            self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (support, query)
        ]
        # As in a batch that comes to a device: tensors of inference mode.
        valid, share = valid.clone(), share.clone()
        logits = self.repri_logits(features[0], labels, features[1], valid, share)
        self.seen.append((logits, features, labels))


def test_it_works_in_the_inference_mode_of_a_test():
    support, query = fixed(2, 2, 3, 8, 8).float(), fixed(2, 1, 3, 8, 8).float().roll(3, -1)
    labels = (fixed(2, 2, 8, 8) > 0.5).long()
    module = Tested()
    valid, share = torch.ones(2, 1, 8, 8), torch.tensor([0.3, 0.5])
    data = [(support, labels, query, valid, share)]
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.test(module, DataLoader(data, batch_size=None), verbose=False)
    logits, features, _ = module.seen[0]
    assert logits.shape == (2, 1, 4, 4)
    shares = {"proportion": share, "iterations": 5}
    expected = repri(features[0], labels[..., ::2, ::2], features[1], **shares)
    torch.testing.assert_close(logits, expected)


def test_features_that_do_not_fit_are_refused():
    module = Tested()
    with pytest.raises(ArgumentError, match="labels"):
        module.repri_logits(torch.ones(1, 2, 5, 4), torch.ones(1, 3, 4), torch.ones(1, 1, 5, 4))
