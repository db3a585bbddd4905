"""Which parameters are chosen."""

import pytest
import torch
from torch import nn

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.selection import ParameterSelection


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm([4, 2, 2])
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(2, 2))


def test_default_leaves_out_biases_norms_and_frozen_and_counts_tied_once():
    assert list(ParameterSelection().select(Net())) == ["conv.weight", "embedding.weight"]


def test_types_by_class_and_by_name_choose_the_same():
    chosen = ["conv.weight"]
    for kind in (nn.Conv2d, "Conv2d", "torch.nn.Conv2d"):
        assert list(ParameterSelection(types=[kind]).select(Net())) == chosen


def test_a_type_that_is_asked_for_counts_even_if_it_normalizes():
    assert list(ParameterSelection(types=[nn.LayerNorm]).select(Net())) == ["norm.weight"]


def test_patterns_search_and_exclude():
    assert list(ParameterSelection(pattern="emb|conv", exclude=r"^conv").select(Net())) == [
        "embedding.weight"
    ]


def test_parameter_none_takes_all_parameters_of_enough_dimensions():
    chosen = ParameterSelection(parameter=None).select(Net())
    assert list(chosen) == [
        "scale",
        "conv.weight",
        "norm.weight",
        "norm.bias",
        "embedding.weight",
    ]
    assert "head.bias" in ParameterSelection(parameter=None, min_ndim=1).select(Net())


def test_select_modules_names_the_holder_and_the_attribute():
    net = Net()
    chosen = ParameterSelection(pattern="conv").select_modules(net)
    assert chosen == {"conv.weight": (net.conv, "weight")}


def test_of_takes_a_regular_expression_a_selection_or_nothing():
    default = ParameterSelection(types=[nn.Linear])
    assert ParameterSelection.of(None, default=default) is default
    assert ParameterSelection.of(default) is default
    assert list(ParameterSelection.of("scale").select(Net())) == ["scale"]
    with pytest.raises(ArgumentError, match="regular expression, got 3"):
        ParameterSelection.of(3)  # type: ignore[arg-type]


def test_an_empty_choice_names_owner_and_candidates():
    with pytest.raises(ArgumentError, match=r"NormLoss: .*decoder.*conv\.weight \(4, 3, 3, 3\)"):
        ParameterSelection(pattern="decoder").select(Net(), owner="NormLoss")


@pytest.mark.parametrize(
    "bad", [{"pattern": "("}, {"exclude": 1}, {"min_ndim": -1}, {"types": [3]}]
)
def test_bad_arguments_are_named(bad):
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        ParameterSelection(**bad)
