"""Under ``ddp_reg`` ranks share the penalties on weights, and train what undivided ones train."""

import functools

import pytest
import torch

from lightning_reg.engine.communicator import Communicator
from tests.strategies.sharing import (
    VARIANTS,
    Deep,
    beside_a_perturbation,
    both,
    gradients,
    whole_on_each_rank,
    without,
)

SHAPES = sorted(tuple(p.shape) for p in Deep().parameters() if p.ndim == 2)


# 64 samples on 2 ranks in batches of 8 are 4 micro-batches an epoch, for 2 epochs.
STEPS = dict.fromkeys(VARIANTS, 8) | {"accumulated": 4, "uneven_window": 4}


@pytest.fixture(scope="module")
def runs(ranks):
    """What both ranks found, for each variant and mode; trained once."""

    @functools.cache
    def run(variant, mode):
        return ranks.run(both, variant, mode)

    return run


@pytest.mark.parametrize("mode", ["gradient", "loss"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_split_penalties_train_what_whole_ones_train(runs, variant, mode):
    one, other = runs(variant, mode)
    split, logs = one["split"]
    assert torch.equal(split, other["split"][0])
    # fp16 forwards amplify a last-bit difference of a weight.
    atol, rtol = (2e-3, 1e-2) if "fp16" in variant else (2e-6, 1e-5)
    torch.testing.assert_close(split, one["whole"][0], rtol=0, atol=atol)
    assert logs == other["split"][1]
    assert logs == pytest.approx(one["whole"][1], rel=rtol)


def test_penalties_act(ranks, runs):
    bare = ranks.run(without)[0]
    for mode in ("gradient", "loss"):
        assert (runs("plain", mode)[0]["split"][0] - bare).abs().max() > 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_weight_is_worked_on_by_one_rank_once_per_optimizer_step(runs, variant):
    one, other = runs(variant, "gradient")
    assert len(one["split_asked"]) == len(other["split_asked"]) == STEPS[variant]
    for mine, theirs in zip(one["split_asked"], other["split_asked"], strict=True):
        assert sorted(mine + theirs) == SHAPES
        assert mine
        assert theirs
    assert [sorted(shapes) for shapes in one["whole_asked"]] == [SHAPES] * STEPS[variant]


@pytest.mark.parametrize(
    ("variant", "mode"),
    [
        ("find_unused", "gradient"),
        ("accumulated", "gradient"),
        ("find_unused", "loss"),
        # Without a search for unused parameters DDP waits for every weight, on every rank.
        ("plain", "loss"),
        ("static_graph", "loss"),
        ("bucket_view", "loss"),
    ],
)
def test_weight_that_only_the_penalty_reaches_gets_its_gradient(ranks, variant, mode):
    one, other = ranks.run(both, variant, mode, reach=False)
    assert torch.equal(one["split"][0], other["split"][0])
    torch.testing.assert_close(one["split"][0], one["whole"][0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["gradient", "loss"])
def test_perturbation_of_a_rank_is_as_without_the_split(ranks, mode):
    one, other = ranks.run(beside_a_perturbation, mode)
    assert torch.equal(one["ddp_reg"], other["ddp_reg"])
    torch.testing.assert_close(one["ddp_reg"], one["ddp"], rtol=0, atol=2e-6)
    numbers = {len(shapes) for shapes in one["ddp_reg_asked"]}
    # A term of the loss takes part in each rank's own perturbation, so there it stays whole.
    assert (max(numbers) < len(SHAPES)) == (mode == "gradient")


@pytest.mark.parametrize("reason", ["hook", "manual", "ignored"])
def test_work_is_not_split_where_ddp_does_not_leave_an_exact_mean(ranks, reason):
    for numbers in ranks.run(whole_on_each_rank, reason):
        assert numbers == [len(SHAPES)] * 8


def test_later_phases_get_the_whole_gradient(ranks):
    split, whole = ranks.run(gradients, "ddp_reg"), ranks.run(gradients, "ddp")
    assert len(split[0]) == 2
    for mine, theirs, expected in zip(*split, whole[0], strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_shares_are_disjoint_whole_and_balanced(world):
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(48, generator=generator).double().tolist()
    shares = [Communicator(rank, world).shard(costs) for rank in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(48))
    loads = [sum(costs[i] for i in share) for share in shares]
    # Longest first is never further from the even split than by one item.
    assert max(loads) - min(loads) <= max(costs)
    assert max(loads) <= (4 / 3) * max(sum(costs) / world, max(costs))
