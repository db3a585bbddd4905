"""Hooks of a DataModule that would see the positions of samples, and stumble over them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_reg.engine.errors import UnsupportedError
from lightning_reg.engine.memory import IndexedDataset

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_LIBRARIES = ("lightning.", "pytorch_lightning.")


def check_data_hooks(trainer: pl.Trainer) -> None:
    """Refuse batch hooks between an ``IndexedDataset`` and the training step.

    The position is taken off when the step gets its batch; a hook before that would unpack
    ``(sample, index)`` where it expects ``(x, y)``, and a DataModule's hook silently shadows the
    module's.

    Raises:
        UnsupportedError: if such a hook is overridden.
    """
    if not any(_indexed(loader) for loader in _training_loaders(trainer)):
        return
    for name in _HOOKS:
        owner = _overriding(trainer, name)
        if owner is not None:
            raise UnsupportedError(
                "IndexedDataset",
                f"{owner}.{name} would get (sample, index) pairs instead of your batches, since "
                "the index is taken off only when training_step gets its batch",
                cure=f"remove {name}, or put the index into the batch yourself and name it: "
                'signals=Signals(sample_index="batch.index")',
            )


def _training_loaders(trainer: pl.Trainer) -> list[Any]:
    loaders = trainer.fit_loop._combined_loader
    return [] if loaders is None else list(loaders.flattened)


def _indexed(loader: Any) -> bool:
    dataset = getattr(loader, "dataset", None)
    return isinstance(dataset, IndexedDataset)


def _overriding(trainer: pl.Trainer, hook: str) -> str | None:
    """The class whose hook Lightning would call, unless it is Lightning's own."""
    owners = (trainer.datamodule, trainer.lightning_module)  # type: ignore[attr-defined]
    for owner in owners:
        if owner is None:
            continue
        home = next(c for c in type(owner).__mro__ if hook in vars(c))
        if not home.__module__.startswith(_LIBRARIES):
            return type(owner).__name__
    return None
