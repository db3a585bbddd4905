"""A fixed part of the training data, in batches that leave no trace in the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.observe import Observer, sparing_collections
from lightning_reg.engine.random import rng_state
from lightning_reg.engine.rerun import replayed_rng, without_trace
from lightning_reg.engine.step import Step

_SEED = 0
_BATCH = 64


class TrainSubset:
    """Runs the user's ``validation_step`` on training samples, the same ones each time.

    Its logs are silent, its metrics and buffers as they were before, and no random number of the
    run is used up. Each rank runs its share, the same number of batches on all.

    Args:
        owner: the monitor, for messages and signals.
        data: a number of samples, drawn once by a seed of its own; or a dataset of its own.
    """

    def __init__(self, owner: Any, data: Any) -> None:
        self._owner = owner
        self._data = data

    def steps(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> Iterator[tuple[Step, Tensor | None]]:
        """The steps, with what counts of each: (B,), or ``None`` if all does."""
        observer = Observer(self._owner, trainer, module, "validation_step")
        state = rng_state([module.device] if module.device.type != "cpu" else [])
        devices = [module.device] if module.device.type != "cpu" else []
        try:
            with (
                without_trace(module),
                sparing_collections(module),
                replayed_rng(state, devices),
                trainer.precision_plugin.val_step_context(),
            ):
                for index, (given, counted) in enumerate(self._batches(trainer)):
                    batch = trainer.strategy.batch_to_device(given, dataloader_idx=0)
                    run = _caller(module.validation_step, index)
                    yield observer.observe(run, batch, index), counted
        finally:
            observer.close()

    def _batches(self, trainer: pl.Trainer) -> Iterator[tuple[Any, Tensor | None]]:
        loader = trainer.train_dataloader
        dataset = getattr(loader, "dataset", None) if isinstance(self._data, int) else self._data
        indices = self._indices(dataset)
        comm = Communicator.of(trainer)
        share = indices[comm.rank :: comm.world_size]
        most = -(-len(indices) // comm.world_size)
        # A sample too few: one that does not count, so that ranks run as many steps.
        padded = share + indices[: most - len(share)]
        size = getattr(loader, "batch_size", None) or _BATCH
        collate = getattr(loader, "collate_fn", None) or default_collate
        for start in range(0, len(padded), size):
            chosen = padded[start : start + size]
            batch = collate([dataset[i] for i in chosen])  # type: ignore[index]
            real = torch.arange(start, start + len(chosen)) < len(share)
            yield batch, None if bool(real.all()) else real

    def _indices(self, dataset: Any) -> list[int]:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ArgumentError(
                self._owner,
                "takes a part of the training data by position, and the training dataloader has "
                f"{type(dataset).__name__} for a dataset",
                cure=f"{type(self._owner).__name__}(train_data=a_map_style_dataset)",
            )
        length = len(dataset)
        if not isinstance(self._data, int):
            return list(range(length))
        draws = torch.Generator().manual_seed(_SEED)
        order: list[int] = torch.randperm(length, generator=draws).tolist()
        return order[: self._data]


def _caller(step: Callable[..., Any], batch_idx: int) -> Callable[[Any], Any]:
    """The step as Lightning calls it: with the positions that it has parameters for."""
    names = list(inspect.signature(step).parameters)
    further = {"batch_idx": batch_idx, "dataloader_idx": 0}
    given = {name: further[name] for name in names[1:] if name in further}
    plain = len(names) > 1 and "batch_idx" not in given

    def call(batch: Any) -> Any:
        return step(batch, batch_idx, **given) if plain else step(batch, **given)

    return call
