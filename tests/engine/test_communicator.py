"""Collectives: values and gradients on two ranks equal those of the joined batch."""

import pytest
import torch

from lightning_reg.engine.communicator import Communicator, JointMean, gather_together
from lightning_reg.testing.ranks import RankError

ROWS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _comm():
    return Communicator(torch.distributed.get_rank(), torch.distributed.get_world_size())


def _share(sizes):
    rank = torch.distributed.get_rank()
    return ROWS.split(list(sizes))[rank].clone()


def _joint_loss(rows, scale):
    """Not separable over rows: every row's gradient depends on all."""
    return torch.logdet(rows.T @ rows * scale + torch.eye(3, dtype=rows.dtype))


def gathered_gradient(sizes):
    comm = _comm()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    rows = comm.gather(_share(sizes) * scale)
    _joint_loss(rows, 1.0).backward()
    return rows.detach(), comm.reduce(scale.grad, "mean")


@pytest.mark.parametrize("sizes", [(4, 3), (7, 0)])
def test_gathered_loss_has_the_joint_gradient_after_the_mean_over_ranks(ranks, sizes):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    _joint_loss(ROWS * scale, 1.0).backward()
    for rows, gradient in ranks.run(gathered_gradient, sizes):
        assert torch.equal(rows, ROWS * 2.0)
        torch.testing.assert_close(gradient, scale.grad)


def gathered_in_turn(all_sizes):
    """The same communicator meets other numbers of rows, types and shapes again and again."""
    comm = _comm()
    found = []
    for sizes in all_sizes:
        rows = _share(sizes)
        kinds = (rows, rows[:, 0], rows.to(torch.bfloat16), rows > 0, rows.view(-1, 3, 1).float())
        found.append([comm.gather(kind) for kind in kinds])
    return found


def test_rows_arrive_whatever_was_gathered_before(ranks):
    all_sizes = [(4, 3), (0, 7), (7, 0), (1, 6), (3, 4), (6, 1)]
    kinds = (ROWS, ROWS[:, 0], ROWS.to(torch.bfloat16), ROWS > 0, ROWS.view(-1, 3, 1).float())
    for found in ranks.run(gathered_in_turn, all_sizes):
        for turn in found:
            assert all(torch.equal(a, b) for a, b in zip(turn, kinds, strict=True))


def gathered_together(sizes):
    rows = _share(sizes)
    parts = (rows[:, :1] > 0, rows.view(len(rows), 3, 1).float(), rows[:, 0])
    return gather_together(_comm().gather, *parts)


def stacked(values):
    comm = _comm()
    return comm.stack(values[comm.rank].requires_grad_())


def test_tensors_of_one_shape_are_stacked_by_rank(ranks):
    values = [torch.randn(2, 3), torch.randn(2, 3)]
    for found in ranks.run(stacked, values):
        assert torch.equal(found, torch.stack(values))
        assert not found.requires_grad
    assert torch.equal(Communicator().stack(values[0]), values[0][None])


@pytest.mark.parametrize("sizes", [(4, 3), (7, 0), (0, 7)])
def test_rows_of_several_types_come_whole_from_one_gather(ranks, sizes):
    expected = (ROWS[:, :1] > 0, ROWS.view(7, 3, 1).float(), ROWS[:, 0])
    for found in ranks.run(gathered_together, sizes):
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def reduced_gradient(sizes, op):
    comm = _comm()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    moment = comm.reduce((_share(sizes) * scale).square().sum(0), op)
    moment.log().sum().backward()
    return moment.detach(), comm.reduce(scale.grad, "mean")


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_reduced_statistics_have_the_joint_gradient(ranks, op):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    moment = (ROWS * scale).square().sum(0) / (2 if op == "mean" else 1)
    moment.log().sum().backward()
    for value, gradient in ranks.run(reduced_gradient, (4, 3), op):
        torch.testing.assert_close(value, moment.detach())
        torch.testing.assert_close(gradient, scale.grad)


def ragged_mean(sizes, masked):
    rows = _share(sizes)[:, 0]
    weights = (rows > 0).double() if masked else None
    return _comm().mean(rows, weights)


@pytest.mark.parametrize("sizes", [(4, 3), (7, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_mean_counts_each_sample_once(ranks, sizes, masked):
    column = ROWS[:, 0]
    expected = column[column > 0].mean() if masked else column.mean()
    for value in ranks.run(ragged_mean, sizes, masked):
        torch.testing.assert_close(value, expected)


def gradient_through_means(sizes):
    comm = _comm()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    rows = _share(sizes)[:, 0] * scale
    positive = JointMean.of(rows.square(), (rows > 0).double())
    # Single precision beside double: both keep their own.
    half = JointMean.of(rows.float().exp())
    first, second = comm.means([positive, half])
    (first.log() + 0.1 * second.double()).backward()
    return first.detach(), second.detach(), comm.reduce(scale.grad, "mean")


@pytest.mark.parametrize("sizes", [(4, 3), (7, 0)])
def test_means_have_the_joint_values_and_gradient(ranks, sizes):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    column = ROWS[:, 0] * scale
    first, second = column[column > 0].square().mean(), column.exp().mean()
    (first.log() + 0.1 * second).backward()
    for values in ranks.run(gradient_through_means, sizes):
        assert values[1].dtype == torch.float32
        torch.testing.assert_close(values[0], first.detach())
        torch.testing.assert_close(values[1].double(), second.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(values[2], scale.grad, rtol=1e-6, atol=0)


def shares_of_a_second_pass(sizes):
    comm = _comm()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    rows = _share(sizes)[:, 0]
    _, counts = comm.means_and_counts([JointMean.of(rows)])
    (share,) = comm.shares([JointMean.of((rows * scale).exp())], counts)
    share.backward()
    return comm.reduce(share.detach(), "mean"), comm.reduce(scale.grad, "mean")


@pytest.mark.parametrize("sizes", [(4, 3), (7, 0)])
def test_shares_add_up_to_the_joint_mean_and_its_gradient(ranks, sizes):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    mean = (ROWS[:, 0] * scale).exp().mean()
    mean.backward()
    for value, gradient in ranks.run(shares_of_a_second_pass, sizes):
        torch.testing.assert_close(value, mean.detach())
        torch.testing.assert_close(gradient, scale.grad)


def test_weights_are_facts_of_the_batch_where_they_are_said_to_be():
    values = torch.ones(3)
    assert JointMean.of(values).fixed
    assert not JointMean.of(values, values).fixed
    assert JointMean.of(values, values, fixed=True).fixed


def test_mean_over_nothing_is_zero():
    assert Communicator().mean(torch.zeros(0)) == 0


def flags_and_extremes():
    comm = _comm()
    rank = comm.rank
    return (
        comm.any(rank == 1),
        comm.any(torch.tensor(False)),
        float(comm.reduce(torch.tensor(float(rank)), "max")),
        float(comm.reduce(torch.tensor(float(rank)), "min")),
        float(comm.broadcast(torch.tensor(float(rank)), 1)),
    )


def test_flags_extremes_and_broadcast(ranks):
    assert ranks.run(flags_and_extremes) == [(True, False, 1.0, 0.0, 1.0)] * 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_cover_all_items_once_and_balance_their_cost(world_size):
    costs = [5.0, 4.0, 3.0, 3.0, 3.0, 9.0]
    shares = [Communicator(rank, world_size).shard(costs) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share) == list(range(6))
    loads = [sum(costs[i] for i in share) for share in shares]
    # Graham's bound for longest-first: 4/3 - 1/(3 n) of the optimum.
    optimum = {1: 27.0, 2: 14.0, 3: 9.0}[world_size]
    assert max(loads) <= (4 / 3 - 1 / (3 * world_size)) * optimum


def fails_on_one():
    if torch.distributed.get_rank() == 1:
        raise ZeroDivisionError("on purpose")
    torch.distributed.barrier()


def test_a_failing_rank_is_reported_and_the_pair_recovers(ranks):
    with pytest.raises(RankError, match="on purpose"):
        ranks.run(fails_on_one)
    assert ranks.run(flags_and_extremes)[0][0]


def test_a_mean_whose_weights_are_all_zero_is_zero_and_so_is_its_gradient():
    values = torch.ones(3, requires_grad=True)
    (100 * Communicator().mean(values, torch.zeros(3))).backward()
    assert torch.equal(values.grad, torch.zeros(3))
