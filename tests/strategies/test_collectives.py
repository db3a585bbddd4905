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
def test_ten_techniques_need_one_more_than_ddp_and_one_for_the_log(ranks, strategy):
    silent = {"forward": ["all_reduce"], "backward": [], "after": []}
    logged = {"forward": ["all_reduce"], "backward": [], "after": ["all_reduce"]}
    for steps in ranks.run(count, "ten", strategy, 1):
        assert steps == [logged] * 3
    for steps in ranks.run(count, "ten", strategy, 3):
        assert steps == [silent, silent, logged]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_penalties_on_weights_need_none(ranks, strategy):
    for steps in ranks.run(count, "weights", strategy, 50):
        assert steps == [{"forward": [], "backward": [], "after": []}] * 3


def test_each_pass_over_the_batch_needs_one(ranks):
    steps = ranks.run(count, "second_pass", "ddp_reg", 50)[0]
    # The first step checks that the pass can be run again.
    assert [len(step["forward"]) for step in steps] == [3, 2, 2]
    assert all(step["backward"] == step["after"] == [] for step in steps)


def test_gathers_are_the_price_of_joint_spectra_and_of_tables(ranks):
    # Sizes and rows, and in backward the sum of what every rank says of them.
    for step in ranks.run(count, "gathered", "ddp_reg", 50)[0]:
        assert step["forward"] == ["all_gather", "all_gather", "all_reduce"]
        assert step["backward"] == ["all_reduce"]
    # Sizes, then positions and rows at once.
    for step in ranks.run(count, "table", "ddp_reg", 50)[0]:
        assert step["forward"] == ["all_gather", "all_gather", "all_reduce"]
        assert step["backward"] == []
