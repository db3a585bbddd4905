"""A resumed run trains the same bits as one that was not stopped."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_reg.engine.exact_resume import ExactResume
from tests.engine.simple import INPUTS, LABELS, Host, trainer, weights


class Augmented(Dataset):
    """Draws from all three global generators while samples are fetched."""

    def __len__(self):
        return len(INPUTS)

    def __getitem__(self, index):
        noise = torch.randn(8) + random.gauss(0, 1) + np.random.randn()
        return INPUTS[index] + 0.1 * noise.float(), LABELS[index]


def loader():
    return StatefulDataLoader(Augmented(), batch_size=16, shuffle=True)


def run(folder=None, every=None, resume=None, max_epochs=3, validate=False, exact=True, **kwargs):
    random.seed(3)
    np.random.seed(3)
    module = Host(dropout=0.5)
    if validate:
        module.validation_step = lambda batch, batch_idx: None
    torch.manual_seed(3 if resume is None else 77)
    callbacks = [ExactResume()] if exact else []
    if folder is not None:
        callbacks.append(
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
            if every
            else ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **kwargs)
        )
    fit = trainer(callbacks, max_epochs=max_epochs, enable_checkpointing=folder is not None)
    fit.fit(module, loader(), loader() if validate else None, ckpt_path=resume)
    return weights(module)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 7, 11])
def test_resume_inside_an_epoch_is_bit_equal(tmp_path, step):
    whole = run(tmp_path, every=1)
    assert torch.equal(run(resume=tmp_path / f"step={step}.ckpt"), whole)


@pytest.mark.parametrize("step", [4, 8])
def test_resume_between_epochs_is_bit_equal(tmp_path, step):
    whole = run(tmp_path, save_on_train_epoch_end=True)
    assert torch.equal(run(resume=tmp_path / f"step={step}.ckpt"), whole)


def test_plain_loader_resumes_between_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.StatefulDataLoader", DataLoader)
    whole = run(tmp_path, save_on_train_epoch_end=True)
    assert torch.equal(run(resume=tmp_path / "step=4.ckpt"), whole)


@pytest.mark.parametrize("step", [2, 6])
def test_validation_draws_do_not_disturb(tmp_path, step):
    whole = run(tmp_path, every=2, validate=True)
    assert torch.equal(run(resume=tmp_path / f"step={step}.ckpt", validate=True), whole)


def test_without_it_the_resumed_run_differs(tmp_path):
    whole = run(tmp_path, every=1)
    assert not torch.equal(run(resume=tmp_path / "step=2.ckpt", exact=False), whole)


def test_a_checkpoint_without_states_is_named(tmp_path):
    run(tmp_path, every=2, exact=False)
    with pytest.warns(UserWarning, match="ExactResume: the checkpoint holds no random state"):
        run(resume=tmp_path / "step=2.ckpt")
