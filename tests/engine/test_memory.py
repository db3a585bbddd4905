"""Tables of per-sample memories, in one process and over ranks."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.memory import IndexedDataset, IndexedSample, SampleMemory, take_index


class Ranks:
    """Ranks as threads."""

    def __init__(self, rank: int, world_size: int, slots: list, barrier: Barrier) -> None:
        self.rank, self.world_size = rank, world_size
        self.slots, self.barrier = slots, barrier

    def gather(self, tensor):
        self.slots[self.rank] = tensor
        self.barrier.wait()
        joined = torch.cat(list(self.slots))
        self.barrier.wait()
        return joined


def on_ranks(work, world_size=2):
    slots, barrier = [None] * world_size, Barrier(world_size)
    comms = [Ranks(rank, world_size, slots, barrier) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, comms))


def test_indexed_batches_survive_workers_collation_and_transfer():
    data = IndexedDataset(TensorDataset(torch.arange(6.0), torch.arange(6) % 2))
    for workers in (0, 1):
        batches = list(DataLoader(data, batch_size=4, num_workers=workers))
        batch, index = take_index(move_data_to_device(batches[1], torch.device("cpu")))
        assert torch.equal(index, torch.tensor([4, 5]))
        assert torch.equal(batch[0], torch.tensor([4.0, 5.0]))


def test_a_batch_without_positions_is_passed_through():
    batch = (torch.zeros(2), torch.zeros(2))
    assert take_index(batch) == (batch, None)


def test_wrapper_shows_the_datasets_attributes_and_pickles():
    inner = TensorDataset(torch.zeros(3))
    inner.classes = ["a"]
    data = IndexedDataset(inner)
    assert data.classes == ["a"]
    assert len(pickle.loads(pickle.dumps(data))) == len(copy.deepcopy(data)) == 3
    with pytest.raises(AttributeError):
        data.missing  # noqa: B018


def test_batched_fetches_of_the_dataset_keep_their_positions():
    class Batched(TensorDataset):
        def __getitems__(self, indices):
            return [10 * i for i in indices]

    data = IndexedDataset(Batched(torch.zeros(4)))
    (batch,) = DataLoader(data, batch_size=4)
    assert take_index(batch)[0].tolist() == [0, 10, 20, 30]
    assert take_index(batch)[1].tolist() == [0, 1, 2, 3]


def test_negative_positions_are_the_same_rows():
    assert IndexedDataset(TensorDataset(torch.zeros(4)))[-1].index == 3


def test_own_collate_function_sees_plain_samples():
    data = IndexedDataset([1, 2, 3])
    collate = IndexedDataset.collate(lambda samples: {"sum": sum(samples)})
    (batch,) = DataLoader(data, batch_size=3, collate_fn=collate)
    assert isinstance(batch, IndexedSample)
    assert batch.sample == {"sum": 6}
    assert batch.index.tolist() == [0, 1, 2]


def test_iterable_datasets_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(ArgumentError, match=r"map-style dataset.*Stream is iterated"):
        IndexedDataset(Stream())


def test_rows_come_back_and_others_keep_their_fill():
    memory = SampleMemory(4, 2, fill=0.5)
    memory.write(torch.tensor([2, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    expected = torch.tensor([[3.0, 4.0], [0.5, 0.5], [1.0, 2.0], [0.5, 0.5]])
    assert torch.equal(memory.read(torch.arange(4)), expected)
    assert memory.seen.tolist() == [True, False, True, False]


def test_reads_are_copies_and_writes_keep_no_graph():
    memory = SampleMemory(2, 1)
    memory.write(torch.tensor([0]), torch.ones(1, 1, requires_grad=True))
    memory.read(torch.tensor([0])).add_(5)
    assert memory.table[0, 0] == 1
    assert not memory.table.requires_grad


def test_padding_and_rows_that_are_not_finite_are_not_written():
    memory = SampleMemory(3, 2)
    rows = torch.tensor([[1.0, 1.0], [float("nan"), 1.0], [2.0, float("inf")]])
    memory.write(torch.tensor([0, 1, 2]), rows, mask=torch.tensor([True, False, False]))
    assert not memory.seen.any()
    assert not memory.table.any()


def test_a_padding_repeat_does_not_hide_the_sample_itself():
    memory = SampleMemory(3, 1)
    mask = torch.tensor([True, False])
    memory.write(torch.tensor([1, 1]), torch.tensor([[9.0], [2.0]]), mask=mask)
    assert memory.table[1, 0] == 2


def test_of_a_repeated_sample_the_first_row_counts():
    memory = SampleMemory(3, 1)
    memory.write(torch.tensor([1, 0, 1]), torch.tensor([[1.0], [2.0], [3.0]]))
    assert memory.table.flatten().tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("sizes", [(4, 4), (4, 3)])
def test_tables_of_all_ranks_are_the_one_process_table(sizes):
    generator = torch.Generator().manual_seed(0)
    total = sum(sizes)
    index = torch.randint(0, 5, (total,), generator=generator)  # with repeats over ranks
    rows = torch.randn(total, 3, generator=generator)
    mask = torch.rand(total, generator=generator) < 0.2
    alone = SampleMemory(6, 3)
    alone.write(index, rows, mask)

    def work(comm):
        memory = SampleMemory(6, 3, comm=comm)
        own = slice(comm.rank, total, comm.world_size)  # as DistributedSampler deals
        memory.write(index[own], rows[own], mask[own])
        return memory.table, memory.seen

    for table, seen in on_ranks(work):
        assert torch.equal(table, alone.table)
        assert torch.equal(seen, alone.seen)


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_index_outside_the_table_changes_nothing(bad):
    memory = SampleMemory(3, 1)
    with pytest.raises(ArgumentError, match=f"index {bad} lies outside a table of 3"):
        memory.write(torch.tensor([0, bad]), torch.ones(2, 1))
    assert not memory.table.any()
    with pytest.raises(ArgumentError, match="outside"):
        memory.read(torch.tensor([bad]))


def test_a_wrong_index_on_one_rank_stops_all_ranks():
    def work(comm):
        memory = SampleMemory(3, 1, comm=comm)
        with pytest.raises(ArgumentError):
            memory.write(torch.tensor([7 if comm.rank else 0]), torch.ones(1, 1))
        return memory.table.any()

    assert not any(on_ranks(work))


def test_wrong_shapes_on_one_rank_stop_all_ranks():
    def work(comm):
        memory = SampleMemory(3, 1, comm=comm)
        with pytest.raises(ArgumentError):
            memory.write(torch.tensor([0, 1]), torch.ones(2, 1 + comm.rank))
        return memory.table.any()

    assert not any(on_ranks(work))


def test_state_is_tensors_and_fits_only_the_same_table(tmp_path):
    memory, other = SampleMemory(3, 2), SampleMemory(3, 2)
    memory.write(torch.tensor([1]), torch.ones(1, 2))
    torch.save(memory.state_dict(), tmp_path / "m.pt")
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert torch.equal(other.table, memory.table)
    assert torch.equal(other.seen, memory.seen)
    with pytest.raises(ArgumentError, match=r"\(3, 2\).*\(4, 2\)"):
        SampleMemory(4, 2).load_state_dict(memory.state_dict())


def test_rows_are_kept_in_the_tables_type():
    memory = SampleMemory(1, 1, dtype=torch.float16)
    memory.write(torch.tensor([0]), torch.tensor([[1 / 3]]))
    assert memory.table.dtype == torch.float16


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (1.5, 1)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ArgumentError, match="whole number from 1"):
        SampleMemory(*sizes)
