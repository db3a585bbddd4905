"""The table: its size, who writes it and when, over ranks, second passes, resumes and fits."""

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from lightning_reg.engine import (
    ArgumentError,
    IndexedDataset,
    MissingSignalError,
    RegularizationError,
    Signals,
)
from lightning_reg.engine.schedule import StepSchedule
from lightning_reg.mechanisms.sample_memory import SampleMemoryRegularizer
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Ascent, Host, trainer

SAMPLES = 31


class Visits(SampleMemoryRegularizer):
    """Counts the visits of each sample and keeps its last logits: (count, 4 logits)."""

    needs = ("logits", "sample_index")
    semantics = "global"

    def __init__(self, strength=1.0, **settings):
        super().__init__(strength, **settings)

    def penalty(self, step):
        past = self.recall(step, 5)
        rows = torch.cat([past[:, :1] + 1, step.logits.detach()], dim=1)
        self.remember(step, rows)
        return step.comm.mean(step.logits.square().mean(1))

    @property
    def counts(self):
        return self.memory.memory.table[:, 0]


def dataset(count=SAMPLES):
    return TensorDataset(INPUTS[:count], LABELS[:count])


def loader(data=None, batch_size=8, **settings):
    data = IndexedDataset(dataset()) if data is None else data
    return DataLoader(data, batch_size=batch_size, **settings)


def train(technique, data=None, epochs=1, others=(), module=None, **settings):
    run = trainer([technique, *others], max_epochs=epochs, **settings)
    run.fit(module if module is not None else Host(), data if data is not None else loader())
    return run


# ---------------------------------------------------------------------- size


def test_table_is_as_long_as_the_training_set():
    technique = Visits()
    train(technique)
    assert technique.memory.memory.table.shape == (SAMPLES, 5)
    assert technique.memory.memory.seen.all()


def test_subset_of_an_indexed_dataset_keeps_the_positions_of_the_whole():
    technique = Visits()
    train(technique, loader(Subset(IndexedDataset(dataset()), [3, 7, 30])))
    assert len(technique.counts) == SAMPLES
    assert technique.counts.nonzero().flatten().tolist() == [3, 7, 30]


def test_indexed_subset_counts_its_own_positions():
    technique = Visits()
    train(technique, loader(IndexedDataset(Subset(dataset(), [3, 7, 30]))))
    assert technique.counts.tolist() == [1.0, 1.0, 1.0]


def test_joined_indexed_datasets_are_refused():
    both = ConcatDataset([IndexedDataset(dataset(10)), IndexedDataset(dataset(5))])
    with pytest.raises(ArgumentError, match=r"IndexedDataset\(ConcatDataset"):
        train(Visits(), loader(both))


def test_index_of_an_endless_dataset_needs_a_size():
    class Endless(IterableDataset):
        def __iter__(self):
            return ((INPUTS[i], LABELS[i], i) for i in range(16))

    signals = Signals(sample_index="batch.2")
    with pytest.raises(ArgumentError, match=r"Visits.*num_samples"):
        train(Visits(signals=signals), loader(Endless()), module=Triples())
    technique = Visits(signals=signals, num_samples=20)
    train(technique, loader(Endless()), module=Triples())
    assert technique.counts.sum() == 16


class Triples(Host):
    def training_step(self, batch, batch_idx):
        return super().training_step(tuple(batch[:2]), batch_idx)


def test_dataset_without_positions_is_refused_in_the_first_step():
    with pytest.raises(MissingSignalError, match=r"Visits.*sample_index.*IndexedDataset\(dataset"):
        train(Visits(), loader(dataset()))


def test_rows_of_another_width_are_refused():
    with pytest.raises(RegularizationError, match=r"Visits.*remembers 3 numbers.*has 5"):
        train(Visits(width=3, num_samples=SAMPLES), loader())


@pytest.mark.parametrize("arguments", [{"num_samples": 0}, {"num_samples": 1.0}, {"width": True}])
def test_bad_sizes_are_refused(arguments):
    with pytest.raises(ArgumentError, match="Visits"):
        Visits(**arguments)


# ---------------------------------------------------------------------- who writes when


def test_a_second_pass_recalls_the_first_and_does_not_write():
    alone, beside = Visits(), Visits()
    train(alone, epochs=2, module=Host(lr=0.0))
    train(beside, others=[Ascent(0.5)], epochs=2, module=Host(lr=0.0))
    assert beside.counts.tolist() == [2.0] * SAMPLES
    # The second pass has other logits, at perturbed weights.
    torch.testing.assert_close(beside.memory.memory.table, alone.memory.memory.table)


def test_accumulation_counts_each_sample_once():
    technique = Visits()
    train(technique, accumulate_grad_batches=2)
    assert technique.counts.tolist() == [1.0] * SAMPLES


def test_a_schedule_at_zero_keeps_the_table_up_to_date():
    off, later = Visits(0.0), Visits(StepSchedule([0.0, 1.0], [100]))
    train(off)
    train(later)
    assert off.memory.memory is None
    assert later.counts.tolist() == [1.0] * SAMPLES


def test_a_second_fit_from_step_zero_forgets():
    technique = Visits()
    train(technique)
    train(technique)
    assert technique.counts.tolist() == [1.0] * SAMPLES


def test_a_fit_that_goes_on_remembers():
    technique, module = Visits(), Host()
    run = train(technique, module=module)
    run.fit_loop.max_epochs = 3
    run.fit(module, loader())
    assert technique.counts.tolist() == [3.0] * SAMPLES


def test_resume_goes_on_with_the_table(tmp_path):
    first, second = Visits(), Visits()
    run = train(first)
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = trainer([second], max_epochs=2)
    again.fit(Host(), loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert second.counts.tolist() == [2.0] * SAMPLES


def test_table_of_another_dataset_is_refused(tmp_path):
    run = train(Visits())
    run.save_checkpoint(tmp_path / "one.ckpt")
    other = loader(IndexedDataset(dataset(20)))
    with pytest.raises(ArgumentError, match=r"\(31, 5\).*\(20, 5\)"):
        trainer([Visits()], max_epochs=2).fit(Host(), other, ckpt_path=tmp_path / "one.ckpt")


# ---------------------------------------------------------------------- ranks


def train_on_ranks(lr, epochs):
    technique = Visits(0.1)
    run = rank_trainer(callbacks=[technique], max_epochs=epochs)
    # DistributedSampler shuffles, and repeats one of 31 samples to deal out 32.
    run.fit(Host(lr=lr), loader(batch_size=4, shuffle=True))
    memory = technique.memory.memory
    return memory.table, memory.seen


def test_table_on_two_ranks_is_that_of_one_process(ranks):
    (first, seen), (second, _) = ranks.run(train_on_ranks, 0.0, 3)
    alone = Visits(0.1)
    train(alone, loader(shuffle=True), epochs=3, module=Host(lr=0.0))
    assert torch.equal(first, second)
    assert seen.all()
    # Nobody lost, nobody twice, although samples moved between the ranks.
    assert first[:, 0].tolist() == [3.0] * SAMPLES
    torch.testing.assert_close(first, alone.memory.memory.table, rtol=0, atol=1e-6)


def train_joint(share):
    technique = Visits(0.1)
    settings = {"callbacks": [technique], "max_epochs": 2}
    run = rank_trainer(use_distributed_sampler=False, **settings) if share else trainer(**settings)
    rank = torch.distributed.get_rank() if share else 0
    order = torch.arange(30)
    mine = order[rank::2] if share else order
    data = Subset(IndexedDataset(dataset(30)), mine.tolist())
    # Joint batches of 6, of which each rank has 3.
    run.fit(Host(), loader(data, batch_size=3 if share else 6))
    return technique.memory.memory.table


def test_joint_batches_train_the_table_of_one_process(ranks):
    first, second = ranks.run(train_joint, True)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, train_joint(False), rtol=0, atol=1e-5)
