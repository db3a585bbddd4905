"""On two ranks a resumed run trains the same bits, in whatever way samples reach the ranks."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DistributedSampler, TensorDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_reg.engine.exact_resume import ExactResume
from lightning_reg.testing import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, weights

DATA = TensorDataset(INPUTS, LABELS)


def weighted():
    return WeightedRandomSampler(torch.arange(1.0, 65.0), 64)


def loader(kind):
    settings = {"shuffle": True}
    if kind == "distributed":
        settings = {"sampler": DistributedSampler(DATA)}
    elif kind == "weighted":
        settings = {"sampler": weighted()}
    return StatefulDataLoader(DATA, batch_size=8, **settings)


class Order(ModelCheckpoint):
    """Keeps the batches as well."""

    batches = ()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches = [*self.batches, batch[0].clone()]


def run(kind, folder, resume=None, between=False):
    torch.manual_seed(3 if resume is None else 77)
    when = {"save_on_train_epoch_end": True} if between else {"every_n_train_steps": 1}
    order = Order(folder, filename="{step}", save_top_k=-1, **when)
    trainer = rank_trainer(
        callbacks=[ExactResume(), order], max_epochs=3, enable_checkpointing=True
    )
    module = Host(dropout=0.5)
    # `Host` seeds for its weights; the loaders draw their own seeds after that.
    torch.manual_seed(5 if resume is None else 78)
    trainer.fit(module, loader(kind), ckpt_path=resume)
    return weights(module), torch.stack(order.batches)


@pytest.mark.parametrize("kind", ["shuffle", "distributed", "weighted"])
@pytest.mark.parametrize(("step", "between"), [(2, False), (6, False), (4, True), (8, True)])
def test_resume_is_bit_equal(ranks, tmp_path, kind, step, between):
    whole = ranks.run(run, kind, tmp_path / "a", None, between)
    again = ranks.run(run, kind, tmp_path / "b", tmp_path / "a" / f"step={step}.ckpt", between)
    for (trained, batches), (resumed, rest) in zip(whole, again, strict=True):
        assert torch.equal(batches[step:], rest)
        assert torch.equal(trained, resumed)


def test_epochs_have_different_orders(ranks, tmp_path):
    """Else the test above could not tell one epoch's order from another's."""
    for kind in ("shuffle", "distributed"):
        _, batches = ranks.run(run, kind, tmp_path / kind)[0]
        first, second = batches[:4].flatten(0, 1), batches[4:8].flatten(0, 1)
        assert not torch.equal(first, second)
