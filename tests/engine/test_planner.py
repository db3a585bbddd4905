"""Order from declared effects, and what excludes what."""

import itertools

import pytest
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_reg.engine import ConflictError, Plan, Regularizer


def technique(class_name, reads=(), writes=(), exclusive=(), name=None):
    body = {
        "reads": frozenset(reads),
        "writes": frozenset(writes),
        "exclusive": frozenset(exclusive),
        "penalty": lambda self, step: None,
    }
    return type(class_name, (Regularizer,), body)(name=name)


def order(techniques):
    return [type(t).__name__ for t in Plan.of(techniques).techniques]


def test_writers_come_before_readers_in_any_list_order():
    parts = [
        technique("Alpha", reads=["targets"]),
        technique("Beta", reads=["inputs"], writes=["targets"]),
        technique("Gamma", writes=["inputs"]),
    ]
    for listed in itertools.permutations(parts):
        assert order(listed) == ["Gamma", "Beta", "Alpha"]


def test_mutual_readers_go_by_name():
    parts = [technique(n, reads=["inputs"], writes=["inputs"]) for n in ("Two", "One")]
    assert order(parts) == order(parts[::-1]) == ["One", "Two"]


def test_cycles_of_three_do_not_hang():
    parts = [
        technique("A", reads=["x"], writes=["y"]),
        technique("B", reads=["y"], writes=["z"]),
        technique("C", reads=["z"], writes=["x"]),
    ]
    assert len({tuple(order(listed)) for listed in itertools.permutations(parts)}) == 1


def test_phases_hold_only_what_overrides_them():
    plan = Plan.of([technique("A")])
    assert len(plan.phases["penalty"]) == 1
    assert plan.phases["perturb"] == ()


def test_other_callbacks_are_left_out():
    plan = Plan.of([StochasticWeightAveraging(1e-2), technique("A")])
    assert [t.name for t in plan.techniques] == ["a"]


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("batch_mixing", "MixSwitch"),
        ("label_smoothing", "smoothing would count twice"),
        ("weight_perturbation", "run the step again"),
        ("criterion", "there is only one"),
    ],
)
def test_exclusive_techniques_are_refused_with_the_reason(tag, words):
    one, other = technique("One", exclusive=[tag]), technique("Other", exclusive=[tag])
    with pytest.raises(ConflictError, match=words):
        Plan.of([one, other])


def test_averaging_excludes_lightnings_own():
    averaging = technique("Ema", exclusive=["weight_averaging"])
    with pytest.raises(ConflictError, match="StochasticWeightAveraging"):
        Plan.of([averaging, StochasticWeightAveraging(1e-2)])


def test_two_of_a_class_need_names():
    cls = type(technique("Twin"))
    with pytest.raises(ConflictError, match="name="):
        Plan.of([cls(), cls()])
    assert len(Plan.of([cls(), cls(name="other")]).techniques) == 2
