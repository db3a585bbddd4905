"""Ranks need one collective a validation, for all values of all monitors together."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lightning_reg.monitors import CalibrationMonitor, EntropyMonitor, OverfitMonitor
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host
from tests.strategies.collectives import FUNCTIONS

LOADERS = 2


class Validated(Host):
    """The host with a validation step."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        return {"logits": self(x), "targets": y}


def monitors(train_data):
    return [
        CalibrationMonitor(figures=False, metrics=["smece", "brier"]),
        EntropyMonitor(figures=False),
        OverfitMonitor(figures=False, train_data=train_data),
    ]


def validate(train_data):
    """What one validation in a fit sends, and the values of all monitors."""
    calls = []

    def counted(name, original):
        def call(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        return call

    data = torch.utils.data.TensorDataset(INPUTS, LABELS)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    run = rank_trainer(
        callbacks=monitors(train_data),
        max_epochs=1,
        num_sanity_val_steps=0,
        limit_val_batches=1.0,
        enable_checkpointing=False,
    )
    module = Validated()
    with ExitStack() as stack:
        for name in FUNCTIONS:
            wrapped = counted(name, getattr(dist, name))
            module.on_validation_epoch_start = lambda: calls.clear()
            stack.enter_context(mock.patch.object(dist, name, wrapped))
        module.on_validation_end = lambda: calls.append("end")
        run.fit(module, loader, [loader] * LOADERS)
    values = {k: float(v) for k, v in run.callback_metrics.items() if k[:3] in ("val", "gap")}
    return calls[: calls.index("end")], values


@pytest.mark.parametrize("train_data", [None, 16])
def test_all_monitors_share_one_reduction(ranks, train_data):
    (calls, values), (others, same) = ranks.run(validate, train_data)
    assert calls == others == ["all_reduce"]
    assert values == same
    for start in ("val/ece/dataloader_idx_", "val/smece/dataloader_idx_", "gap/loss/dataloader_"):
        assert sum(key.startswith(start) for key in values) == LOADERS
