"""A pair of processes answers by rank, names what failed, and goes on."""

import os

import pytest
import torch

from lightning_reg.testing import RankError, RankPair


def rank_and(value):
    return torch.distributed.get_rank(), value


def add_ranks():
    total = torch.tensor(float(torch.distributed.get_rank() + 1))
    torch.distributed.all_reduce(total)
    return float(total)


def die():
    os._exit(3)


def test_answers_come_by_rank_and_collectives_work(ranks):
    assert ranks.run(rank_and, "x") == [(0, "x"), (1, "x")]
    assert ranks.run(add_ranks) == [3.0, 3.0]


def test_deaths_are_named_and_the_next_call_works():
    with RankPair() as pair:
        with pytest.raises(RankError, match="rank 0 died"):
            pair.run(die)
        assert pair.run(add_ranks) == [3.0, 3.0]
