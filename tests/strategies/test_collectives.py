"""All numbers that techniques need from other ranks go by few collectives."""

import pytest

from tests.strategies.collectives import count, ten

STRATEGIES = ["ddp", "ddp_reg"]


def test_ten_techniques_are_ten():
    assert len({type(technique) for technique in ten()}) == 10


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_techniques_there_is_none(ranks, strategy):
    for steps in ranks.run(count, "none", strategy, 1):
        assert steps == [{"forward": [], "backward": [], "after": []}] * 3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("log_every_n_steps", [1, 3])
def test_ten_techniques_need_one_more_than_ddp_and_none_for_the_log(
    ranks, strategy, log_every_n_steps
):
    one = {"forward": ["all_reduce"], "backward": [], "after": []}
    for steps in ranks.run(count, "ten", strategy, log_every_n_steps):
        assert steps == [one] * 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_penalties_on_weights_need_none(ranks, strategy):
    for steps in ranks.run(count, "weights", strategy, 50):
        assert steps == [{"forward": [], "backward": [], "after": []}] * 3


def test_the_log_of_split_penalties_needs_one_if_nothing_else_goes_to_the_ranks(ranks):
    for steps in ranks.run(count, "weights", "ddp_reg", 3):
        assert [len(step["forward"]) for step in steps] == [0, 0, 0]
        assert [len(step["after"]) for step in steps] == [0, 0, 1]


def test_replicated_penalties_are_logged_without_any(ranks):
    for steps in ranks.run(count, "weights", "ddp", 1):
        assert all(step["after"] == [] for step in steps)


@pytest.mark.parametrize("techniques", ["second_pass", "attack"])
def test_a_second_pass_needs_none(ranks, techniques):
    steps = ranks.run(count, techniques, "ddp_reg", 50)[0]
    # The first step checks that the pass can be run again.
    assert [step["forward"] for step in steps] == [["all_reduce"] * 2] + [["all_reduce"]] * 2
    assert all(step["backward"] == step["after"] == [] for step in steps)


def test_the_rise_behind_a_second_pass_needs_one_where_it_is_logged(ranks):
    steps = ranks.run(count, "second_pass", "ddp_reg", 3)[0]
    assert [step["forward"] for step in steps[1:]] == [["all_reduce"]] * 2
    assert [step["after"] for step in steps] == [[], [], ["all_reduce"]]


def test_gathers_are_the_price_of_joint_spectra_and_of_tables(ranks):
    # One for the rows, and in backward the sum of what every rank says of them. The first step
    # does not know yet how many rows there are.
    spectra = ranks.run(count, "gathered", "ddp_reg", 50)[0]
    assert [step["forward"].count("all_gather") for step in spectra] == [2, 1, 1]
    assert all(step["forward"].count("all_reduce") == 1 for step in spectra)
    assert all(step["backward"] == ["all_reduce"] for step in spectra)
    # Positions and rows at once.
    table = ranks.run(count, "table", "ddp_reg", 50)[0]
    assert [step["forward"] for step in table[1:]] == [["all_gather", "all_reduce"]] * 2
    assert all(step["backward"] == [] for step in table)
