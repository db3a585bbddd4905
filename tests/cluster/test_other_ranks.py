"""A checkpoint of two ranks goes on with one, and the other way round.

Batches are such that the joint batch stays the same: then the same samples follow, and the run
that changed its number of ranks equals to rounding the one that did not.
"""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DistributedSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_reg.engine import IndexedDataset
from lightning_reg.engine.exact_resume import ExactResume
from lightning_reg.techniques.continual.previous_task_anchor import PreviousTaskAnchor
from lightning_reg.techniques.noisy_labels.early_learning import EarlyLearning
from lightning_reg.techniques.weights.norm_loss import NormLoss
from lightning_reg.testing import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, trainer, weights

DATA = IndexedDataset(TensorDataset(INPUTS, LABELS))
JOINT_BATCH = 16


def train(make_trainer, ranks, folder, resume=None):
    """Three epochs of four steps; what they leave, and what was warned of."""
    memory, anchor = EarlyLearning(1.0), PreviousTaskAnchor(0.1, parameters="net")
    kept = {"dirpath": folder, "filename": "{step}", "save_top_k": -1}
    run = make_trainer(
        callbacks=[
            memory,
            anchor,
            NormLoss(0.01),
            ExactResume(),
            ModelCheckpoint(every_n_train_steps=6, **kept),
            ModelCheckpoint(save_on_train_epoch_end=True, **kept),
        ],
        max_epochs=3,
        enable_checkpointing=True,
    )
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    sampler = DistributedSampler(DATA, num_replicas=ranks, rank=rank)
    module = Host()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = StatefulDataLoader(DATA, batch_size=JOINT_BATCH // ranks, sampler=sampler)
        run.fit(module, loader, ckpt_path=resume)
    return {
        "weights": weights(module),
        "momentum": [s["momentum_buffer"] for s in run.optimizers[0].state.values()],
        "memory": memory.state_dict(),
        "reference": torch.load(folder / "step=12.ckpt", weights_only=True)["callbacks"][
            "PreviousTaskAnchor"
        ]["reference"],
        "messages": [str(w.message) for w in caught],
    }


def on_two(folder, resume=None):
    return train(lambda **kw: rank_trainer(strategy="ddp_reg", **kw), 2, folder, resume)


def on_one(folder, resume=None):
    return train(trainer, 1, folder, resume)


@pytest.fixture(scope="module")
def two(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, ranks.run(on_two, folder)[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, on_one(folder)


def assert_goes_on(resumed, whole):
    for what in ("weights", "momentum", "memory", "reference"):
        torch.testing.assert_close(resumed[what], whole[what], rtol=1e-5, atol=1e-6)
    (message,) = [m for m in resumed["messages"] if m.startswith("ExactResume")]
    assert "What cannot be exact" in message


# Step 6 is inside the second epoch, step 8 between it and the third.
@pytest.mark.parametrize("step", [6, 8])
def test_two_ranks_go_on_as_one(two, tmp_path, step):
    folder, whole = two
    resumed = on_one(tmp_path, folder / f"step={step}.ckpt")
    assert_goes_on(resumed, whole)
    assert "written by 2 ranks and is resumed on 1" in "".join(resumed["messages"])


@pytest.mark.parametrize("step", [6, 8])
def test_one_process_goes_on_as_two(one, ranks, tmp_path, step):
    folder, whole = one
    first, second = ranks.run(on_two, tmp_path, folder / f"step={step}.ckpt")
    assert_goes_on(first, whole)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["memory"], second["memory"], rtol=0, atol=0)
    assert "written by 1 ranks and is resumed on 2" in "".join(first["messages"])


def test_the_anchor_is_that_of_the_first_start(two):
    """Else a reference that is taken again would pass for the old one."""
    _, whole = two
    start = {name: p.detach() for name, p in Host().named_parameters()}
    assert whole["reference"].keys() <= start.keys()
    for name, reference in whole["reference"].items():
        assert torch.equal(reference, start[name])
