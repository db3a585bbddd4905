"""One classifier for each sample: positions, biases, copies, and batches that do not fit."""

import copy

import pytest
import torch
from torch import nn

from lightning_reg.engine import RegularizationError
from lightning_reg.mechanisms.head_choice import HeadChoice
from lightning_reg.mechanisms.head_refit import Head


def _heads(bias):
    generator = torch.Generator().manual_seed(0)
    return [
        Head(
            torch.randn(3, 5, dtype=torch.float64, generator=generator),
            torch.randn(3, dtype=torch.float64, generator=generator) if bias else None,
        )
        for _ in range(2)
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_each_sample_has_its_own_classifier_at_all_of_its_positions(bias):
    layer, choice, heads = nn.Linear(5, 3, bias=bias), HeadChoice("Owner", ""), _heads(bias)
    mean = choice.hold(heads, layer.weight)
    torch.testing.assert_close(mean.weight, (heads[0].weight + heads[1].weight).float() / 2)
    choice.attach(layer)
    chosen = torch.tensor([1, 0, 1])
    choice.choose(chosen)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    expected = [
        x[i] @ heads[a].weight.float().t() + (heads[a].bias.float() if bias else 0)
        for i, a in enumerate(chosen.tolist())
    ]
    torch.testing.assert_close(layer(x), torch.stack(expected))
    choice.detach()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_copy_is_attached_to_nothing():
    layer, choice = nn.Linear(5, 3), HeadChoice("Owner", "")
    choice.hold(_heads(True), layer.weight)
    choice.attach(layer)
    assert not copy.deepcopy(choice).attached
    assert choice.attached


def test_without_classifiers_the_layer_is_left_alone():
    layer, choice = nn.Linear(5, 3), HeadChoice("Owner", "")
    choice.attach(layer)
    assert not choice.attached


def test_a_batch_of_another_size_is_named():
    layer, choice = nn.Linear(5, 3), HeadChoice("Owner", "Owner()")
    choice.hold(_heads(True), layer.weight)
    choice.attach(layer)
    choice.choose(torch.tensor([0, 1]))
    with pytest.raises(RegularizationError, match="given 3 samples, and the batch says it of 2"):
        layer(torch.zeros(3, 5))
