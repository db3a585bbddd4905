"""OLS: whose predictions make the soft labels, when they count, and what they know of classes."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, Communicator
from lightning_reg.techniques.labels.online_label_smoothing import (
    OnlineLabelSmoothing,
    class_sums,
    online_label_smoothing,
)
from tests.engine.simple import INPUTS, LABELS, Ascent, Host, fit, trainer, weights

P = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])


def test_sums_are_those_of_right_predictions():
    labels = F.one_hot(torch.tensor([0, 0, 0, 1]), 3).float()
    found = class_sums(P.log(), labels)
    expected = torch.zeros(3, 4)
    expected[0] = torch.tensor([0.7 + 0.6, 0.2 + 0.3, 0.1 + 0.1, 2.0])
    torch.testing.assert_close(found, expected)


def test_rows_that_are_not_finite_or_repeated_do_not_count():
    logits = P.log().clone()
    logits[0, 1] = torch.nan
    labels = F.one_hot(torch.tensor([0, 1, 0, 2]), 3).float()
    found = class_sums(logits, labels, torch.tensor([True, True, True, False]))
    expected = torch.zeros(3, 4)
    expected[0], expected[1] = torch.tensor([0.6, 0.3, 0.1, 1.0]), torch.tensor([0.4, 0.5, 0.1, 1])
    torch.testing.assert_close(found, expected)


def test_soft_labels_take_the_mean_of_their_classes_rows():
    table = P[:3]
    soft = torch.tensor([[0.5, 0.5, 0.0]])
    expected = 0.8 * soft + 0.2 * (0.5 * P[0] + 0.5 * P[1])
    torch.testing.assert_close(online_label_smoothing(soft, table, 0.2), expected)


def by_hand(epochs, share=0.5):
    """The same run, with the table of the official code: a loop over samples."""
    module = Host()
    optimizer = module.configure_optimizers()
    table = None
    for _ in range(epochs):
        sums, counts = torch.zeros(4, 4), torch.zeros(4)
        for x, y in zip(INPUTS.split(16), LABELS.split(16), strict=True):
            logits = module(x)
            for p, label in zip(logits.detach().softmax(1), y.tolist(), strict=True):
                if p.argmax() == label:
                    sums[label] += p
                    counts[label] += 1
            targets = F.one_hot(y, 4).float()
            if table is not None:
                targets = (1 - share) * targets + share * table[y]
            optimizer.zero_grad()
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
        uniform = torch.full((4, 4), 0.25)
        table = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), uniform)
    return module, table


@pytest.mark.parametrize("epochs", [1, 3])
def test_trains_as_by_hand(epochs):
    technique = OnlineLabelSmoothing(0.5)
    module, _ = fit([technique], max_epochs=epochs)
    plain, table = by_hand(epochs)
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-5)
    torch.testing.assert_close(technique.state_dict()["table"], table, rtol=0, atol=1e-5)


def test_a_second_pass_is_not_counted():
    found = []
    for others in ([], [Ascent(1e-12)]):
        technique = OnlineLabelSmoothing(0.5)
        fit([technique, *others], max_epochs=2)
        found.append(technique.state_dict()["table"])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_a_class_of_which_none_was_right_has_a_uniform_label():
    technique = OnlineLabelSmoothing(0.5)
    data = TensorDataset(INPUTS, torch.zeros(64, dtype=torch.long))
    trainer([technique], max_epochs=3).fit(Host(), DataLoader(data, batch_size=16))
    table = technique.state_dict()["table"]
    assert torch.equal(table[1:], torch.full((3, 4), 0.25))
    assert table[0, 0] > 0.9


def test_a_new_run_forgets():
    technique = OnlineLabelSmoothing(0.5)
    fit([technique], max_epochs=2)
    module, _ = fit([technique], max_epochs=2)
    plain, _ = by_hand(2)
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-5)


def test_mass_goes_to_the_class_that_looks_alike():
    # Classes 0 and 1 overlap, 2 and 3 lie apart: label smoothing would give all the same.
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    x = F.pad(centres[labels] + 0.7 * torch.randn(400, 2, generator=draws), (0, 6))
    technique = OnlineLabelSmoothing(0.5)
    loader = DataLoader(TensorDataset(x, labels), batch_size=50)
    trainer([technique], max_epochs=8).fit(Host(lr=0.05), loader)
    table = technique.state_dict()["table"]
    assert table[0, 1] > 2 * table[0, 2:].max()
    assert table[1, 0] > 2 * table[1, 2:].max()


@pytest.mark.parametrize("arguments", [{"strength": 1.1}, {"replaces": "all"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="OnlineLabelSmoothing"):
        OnlineLabelSmoothing(**arguments)


def test_a_sample_that_a_sampler_repeated_counts_once():
    technique, labels = OnlineLabelSmoothing(0.5), torch.tensor([0, 1, 0, 2])
    padding = torch.tensor([False, False, False, True])
    step = SimpleNamespace(logits=P.log(), targets=labels, padding=padding, comm=Communicator())
    distribution = F.one_hot(labels, 3).float()
    technique._add(step, distribution)
    torch.testing.assert_close(technique._sums, class_sums(P.log(), distribution, ~padding))
    assert technique._sums[2, -1] == 0
