"""What the checks compare with sees every difference that it should, and no other."""

import math

import pytest
import torch
from torch import nn

from lightning_reg.testing.snapshot import (
    changed,
    effective_weights,
    equal,
    first_difference,
    largest_gap,
    numbers_of,
    same_bits,
    snapshot,
    tensors_of,
)


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


def add_hook(module):
    module[0].register_forward_hook(lambda *_: None)


def add_parametrization(module):
    nn.utils.parametrizations.weight_norm(module[0])


def freeze(module):
    module[0].weight.requires_grad_(False)


def change_rate(module):
    module[2].p = 0.1


def change_type(module):
    module.double()


def shadow_method(module):
    module.forward = module.forward


def replace_layer(module):
    module[1] = nn.Identity()


def add_buffer(module):
    module[0].register_buffer("mask", torch.ones(3, 2))


@pytest.mark.parametrize(
    "change",
    [
        add_hook,
        add_parametrization,
        freeze,
        change_rate,
        change_type,
        shadow_method,
        replace_layer,
        add_buffer,
    ],
    ids=lambda change: change.__name__,
)
def test_every_kind_of_change_is_seen(change):
    module = network()
    before = snapshot(module)
    change(module)
    assert changed(before, snapshot(module))


def test_training_alone_is_no_change():
    module = network()
    before = snapshot(module)
    module(torch.randn(4, 2)).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert changed(before, snapshot(module)) == {}


def test_changes_say_what_was_and_what_is():
    module = network()
    before = snapshot(module)
    change_rate(module)
    assert changed(before, snapshot(module)) == {"2.p": "was 0.5 and is 0.1"}


def test_effective_weights_go_through_parametrizations():
    module = network()
    weight = module[0].weight.detach().clone()
    add_parametrization(module)
    found = effective_weights(module, ["0.weight", "0.bias"])
    torch.testing.assert_close(found["0.weight"], weight)
    assert sorted(found) == ["0.bias", "0.weight"]


def test_bits_are_compared_with_type_and_shape_and_nan_equals_nan():
    one = torch.tensor([1.0, math.nan])
    assert same_bits(one, one.clone())
    assert not same_bits(one, one.double())
    assert not same_bits(one, one[:1])
    assert not same_bits(torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))


def test_first_difference_names_a_tensor_that_is_missing_or_other():
    one = {"a": torch.zeros(2), "b": torch.ones(2)}
    assert first_difference(one, {k: v.clone() for k, v in one.items()}) is None
    assert first_difference(one, {"a": torch.zeros(2)}) == "b exists in one of them only"
    assert first_difference(one, {**one, "b": torch.zeros(2)}) == "b differs by up to 1"
    assert first_difference(one, {"a": torch.zeros(2)}, ["a"]) is None


def test_largest_gap_is_relative_to_the_largest_number():
    one = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([1.0])}
    other = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([1.5])}
    assert largest_gap(one, other) == (0.125, "b")


@pytest.mark.parametrize(
    "other", [{}, {"a": torch.tensor([math.nan])}, {"a": torch.zeros(2)}], ids=["none", "nan", "2"]
)
def test_largest_gap_of_what_cannot_be_compared_is_infinite(other):
    assert largest_gap({"a": torch.zeros(1)}, other) == (math.inf, "a")


def test_tensors_and_numbers_are_found_in_nested_states():
    state = {"a": [torch.ones(1), {"b": torch.tensor(1)}], "c": 2.0, "d": 3}
    assert sorted(tensors_of(state)) == ["a.0", "a.1.b"]
    assert sorted(numbers_of(state)) == ["a.0", "c"]


class Plain:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": torch.ones(1)}, {"a": torch.ones(1)}, True),
        ({"a": torch.ones(1)}, {"a": torch.zeros(1)}, False),
        ({"a": 1}, {"b": 1}, False),
        ([1, 2], (1, 2), False),
        (1, 1.0, False),
        (math.nan, math.nan, True),
        (Plain(torch.ones(1)), Plain(torch.ones(1)), True),
        (Plain(torch.ones(1)), Plain(torch.zeros(1)), False),
        (nn.Linear(1, 1), nn.Linear(1, 1), False),
        (None, None, True),
    ],
)
def test_equality_looks_inside(one, other, same):
    assert equal(one, other) is same
