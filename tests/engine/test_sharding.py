"""Whole weights and parts of them; plain tensors pass as they are."""

import pytest
import torch
from torch import nn

from lightning_reg.engine import sharding
from lightning_reg.engine.sharding import (
    gathered_together,
    gradients_of,
    is_sharded,
    own_parts,
    part,
    put_weights_away,
    shard_like,
    whole,
    with_parts,
    write,
)


def test_plain_tensors_pass_as_they_are():
    tensor, like = torch.zeros(3), torch.zeros(3)
    assert whole(tensor) is tensor
    assert part(tensor) is tensor
    assert shard_like(tensor, like) is tensor
    assert with_parts(tensor, like) is tensor
    assert own_parts([tensor], [like])[0] is tensor
    write([tensor], [torch.ones(3)])
    assert tensor.tolist() == [1.0] * 3
    put_weights_away(nn.Linear(2, 2))


def test_plain_weights_are_one_group(monkeypatch):
    monkeypatch.setattr(sharding, "LARGEST_GROUP", 1)
    weights = dict(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).named_parameters())
    assert list(gathered_together(weights)) == [weights]
    assert list(gathered_together({})) == []


def test_gradients_leave_those_that_are_there():
    weight, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    weight.grad = torch.full((2,), 7.0)
    found = gradients_of((3 * weight).sum(), [weight, other])
    assert found[0].tolist() == [3.0, 3.0]
    assert found[1] is None
    assert weight.grad.tolist() == [7.0, 7.0]


def _round_trip(rows):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    full = torch.arange(2.0 * rows).view(rows, 2)
    sharded = distribute_tensor(full.clone(), mesh, [Shard(0)])
    sharding.LARGEST_GROUP, kept = 1, sharding.LARGEST_GROUP
    try:
        groups = [list(g) for g in gathered_together({"a": sharded, "b": sharded})]
    finally:
        sharding.LARGEST_GROUP = kept
    again = with_parts(part(sharded) * 2, sharded)
    write([sharded], [full + 1])
    replicas = distribute_tensor(full, mesh, [Replicate()])
    return {
        "sharded": is_sharded(sharded),
        "own": part(sharded).tolist(),
        "whole": whole(sharded).tolist(),
        "doubled": whole(again).tolist(),
        "split": part(shard_like(full, sharded)).tolist(),
        "replicas": part(shard_like(full, replicas)).tolist(),
        "groups": groups,
    }


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_each_rank_keeps_its_rows_of_what_all_computed(rows, ranks):
    full = torch.arange(2.0 * rows).view(rows, 2)
    chunks = [c.tolist() for c in full.chunk(2)] + [[]]
    for rank, found in enumerate(ranks.run(_round_trip, rows)):
        assert found["sharded"]
        assert found["own"] == [[x + 1 for x in row] for row in chunks[rank]]
        assert found["whole"] == (full + 1).tolist()
        assert found["doubled"] == (full * 2).tolist()
        assert found["split"] == chunks[rank]
        assert found["replicas"] == full.tolist()
        assert found["groups"] == [["a"], ["b"]]
