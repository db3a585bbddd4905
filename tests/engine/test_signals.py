"""Paths into batches, and the usual places."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch

from lightning_reg.engine.signals import default_path, logits_of, read_path, write_path

Pair = namedtuple("Pair", ["image", "label"])


@dataclass
class Graph:
    x: torch.Tensor
    y: torch.Tensor


X, Y = torch.zeros(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    ("batch", "inputs", "targets"),
    [
        ((X, Y), "0", "1"),
        ([X, Y], "0", "1"),
        ({"image": X, "label": Y}, "image", "label"),
        ({"pixel_values": X, "labels": Y}, "pixel_values", "labels"),
        (Pair(X, Y), "image", "label"),
        (Graph(X, Y), "x", "y"),
        ((X,), "0", None),
        ({"other": X}, None, None),
    ],
)
def test_usual_places(batch, inputs, targets):
    assert default_path(batch, "inputs") == inputs
    assert default_path(batch, "targets") == targets


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        ((X, Y), "1"),
        ({"a": {"b": (X, Y)}}, "a.b.1"),
        (Pair(X, Y), "label"),
        (Pair(X, Y), "1"),
        (Graph(X, Y), "y"),
        ({"g": [Graph(X, Y)]}, "g.0.y"),
    ],
)
def test_writing_changes_a_copy_only(batch, path):
    new = torch.full((2,), 7.0)
    changed = write_path(batch, path, new)
    assert read_path(changed, path) is new
    assert read_path(batch, path) is Y
    assert type(changed) is type(batch)


def test_a_path_that_does_not_exist_is_a_key_error():
    for batch, path in [((X,), "3"), ({"a": X}, "b"), (Graph(X, Y), "z")]:
        with pytest.raises(KeyError):
            read_path(batch, path)


def test_logits_are_found_in_model_outputs():
    class Output(dict):
        pass

    assert logits_of(X) is X
    assert logits_of(Output(logits=X)) is X
    assert logits_of(Graph(X, Y)) is None
    assert logits_of(torch.ones(2, dtype=torch.long)) is None
