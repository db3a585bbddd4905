"""Slices: gaps by hand, even groups, and a spurious attribute that is found and made up for."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import SliceDiscoveryRebalancing
from lightning_reg.engine import RegularizationError
from lightning_reg.functional import balanced_rows, slice_gaps
from tests.engine.simple import trainer


def test_gaps_are_differences_of_accuracies_within_a_class():
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    scores = torch.tensor([[9.0], [8.0], [1.0], [0.0], [0.5], [3.0], [3.0], [3.0]])
    correct = torch.tensor([True, True, True, False, False, True, False, True])
    # Class 0: two with it, both right; three without it, one right. Class 1 has one side only.
    torch.testing.assert_close(
        slice_gaps(correct, labels, scores, 3), torch.tensor([[2 / 3], [0.0], [0.0]])
    )


def test_balanced_rows_have_equal_groups():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(500, generator=generator) < 0.3).long()
    agrees = torch.rand(500, generator=generator) < 0.9
    has = torch.where(agrees, labels, 1 - labels).double()
    rows = balanced_rows(labels, has, 2)
    groups = torch.bincount(2 * labels[rows] + has[rows].long(), minlength=4)
    smallest = torch.bincount(2 * labels + has.long()).min()
    assert groups.tolist() == [int(smallest)] * 4
    assert len(rows.unique()) == len(rows)
    assert len(balanced_rows(labels, has, 2, limit=5)) == 20


def test_rows_with_the_highest_and_the_lowest_scores_are_taken():
    labels = torch.zeros(8, dtype=torch.long)
    scores = torch.tensor([5.0, 1.0, 7.0, 3.0, 2.0, 9.0, 4.0, 0.0])
    assert sorted(balanced_rows(labels, scores, 1, limit=2).tolist()) == [1, 2, 5, 7]


class Birds(L.LightningModule):
    """A classifier on what is there: a weak core feature, and a strong background."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9)


def _birds(seed, size, agreement):
    """Inputs, labels, and scores of three attributes, of which the second is the background."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (size,), generator=generator)
    agrees = torch.rand(size, generator=generator) < agreement
    background = torch.where(agrees, y, 1 - y)
    noise = torch.randn(size, 4, generator=generator)
    x = torch.stack([1.2 * (2.0 * y - 1), 3.0 * (2.0 * background - 1), 0 * y, 0 * y], 1) + noise
    scores = torch.rand(size, 3, generator=generator)
    scores[:, 1] = background + 0.1 * scores[:, 1]
    return TensorDataset(x, y, scores)


def _trained(technique, seed=0):
    module = Birds()
    order = torch.Generator().manual_seed(seed)
    training = DataLoader(_birds(seed, 1000, 0.95), 50, shuffle=True, generator=order)
    run = trainer([technique], max_epochs=4)
    run.fit(module, training, DataLoader(_birds(seed + 10, 1000, 0.95), 200))
    return module, run


def _accuracies(logits, data):
    """Of each group of label and background."""
    _, y, scores = data.tensors
    right = (logits.argmax(1) == y).float()
    groups = 2 * y + (scores[:, 1] > 0.5).long()
    return torch.stack([right[groups == g].mean() for g in range(4)])


def _technique(**settings):
    return SliceDiscoveryRebalancing(head="head", attributes="batch.2", **settings)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_background_is_found_and_its_worst_group_gains(seed):
    technique = _technique()
    test = _birds(seed + 20, 2000, 0.5)
    plain, _ = _trained(_technique(max_iter=0), seed)
    module, _ = _trained(technique, seed)
    assert technique.chosen[0] == 1
    assert float(technique.gaps[1, 1]) > 0.2
    before, after = (_accuracies(m(test.tensors[0]), test) for m in (plain, module))
    # Measured over four seeds: 0.25 to 0.48 of the worst group, 0.11 to 0.2 of their mean.
    assert float(after.min() - before.min()) > 0.1
    assert float(after.mean() - before.mean()) > -0.02


def test_the_attribute_with_the_largest_score_chooses_the_classifier():
    technique = _technique(min_gap=0.0, max_attributes=2)
    module, run = _trained(technique)
    assert len(technique.chosen) == 2
    test = _birds(30, 100, 0.5)
    found = torch.cat(run.predict(module, DataLoader(test, 40)))
    weights, biases = technique.heads.weights, technique.heads.biases
    x, _, scores = test.tensors
    chosen = scores[:, technique.chosen].argmax(1)
    expected = torch.stack([x[i] @ weights[a].t() + biases[a] for i, a in enumerate(chosen)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(module.head.weight.detach(), weights.mean(0))
    # Afterwards the module is on its own again, with the average.
    torch.testing.assert_close(module(x), x @ weights.mean(0).t() + biases.mean(0))


def test_average_asks_for_no_attributes():
    technique = _technique(min_gap=0.0, combine="mean")
    module, run = _trained(technique)
    x, y, _ = _birds(30, 100, 0.5).tensors
    found = torch.cat(run.predict(module, DataLoader(TensorDataset(x, y), 40)))
    torch.testing.assert_close(found, module(x))


def test_saved_classifiers_choose_in_another_trainer():
    technique = _technique(min_gap=0.0, max_attributes=2)
    module, run = _trained(technique)
    data = DataLoader(_birds(30, 100, 0.5), 40)
    expected = torch.cat(run.predict(module, data))
    other = _technique()
    other.load_state_dict(copy.deepcopy(technique.state_dict()))
    found = torch.cat(trainer([other], max_epochs=1).predict(module, data))
    torch.testing.assert_close(found, expected)


def test_without_a_gap_nothing_changes():
    plain, _ = _trained(_technique(max_iter=0))
    module, _ = _trained(_technique(min_gap=1.0))
    assert torch.equal(module.head.weight, plain.head.weight)


def test_missing_attributes_are_named():
    with pytest.raises(RegularizationError, match=r"at 'batch\.7', and the batch has no '7'"):
        _trained(SliceDiscoveryRebalancing(head="head", attributes="batch.7"))
