"""Saves the global random state, so that a resumed run goes on bit for bit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_reg.engine.random import restore_rng_state, rng_state

_KEY = "lightning_reg.exact_resume"


class ExactResume(Callback):
    """Saves every rank's global random state in checkpoints and goes on from it on resume.

    Lightning restores weights, optimizers and loops, but not the generators that dropout and
    shuffling draw from. With this callback, and torchdata's ``StatefulDataLoader`` for the
    position in the data, a run that was stopped inside an epoch and resumed trains the same bits
    as one that was not (same machine, same versions, same number of ranks).

    Saved are torch's CPU generator, the accelerator's, Python's ``random`` and numpy's, on each
    rank. The techniques of this package draw from streams of their own and need nothing saved.

    A checkpoint that ``ModelCheckpoint(every_n_train_steps=...)`` writes at the very last batch
    of an epoch makes Lightning itself miscount epochs on resume; write epoch ends with
    ``save_on_train_epoch_end=True``.

    Example:
        >>> import lightning as L
        >>> from lightning_reg.engine.exact_resume import ExactResume
        >>> trainer = L.Trainer(callbacks=[ExactResume()], logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._states: list[dict[str, Any]] | None = None
        self._positions: list[dict[str, Any]] = []

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Collect the states of all ranks; Lightning calls this on every rank."""
        own = rng_state([trainer.strategy.root_device])
        own["loaders"] = [generator.get_state() for generator in _generators(trainer)]
        states = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [own] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, own)
        checkpoint[_KEY] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep this rank's state until the moment at which it was taken comes again."""
        self._states = checkpoint.get(_KEY)
        self._positions = (
            checkpoint.get("loops", {})
            .get("fit_loop", {})
            .get("state_dict", {})
            .get("combined_loader", [])
        )
        if self._states is None:
            rank_zero_warn(
                "ExactResume: the checkpoint holds no random state, so the resumed run will not "
                "repeat the original one. Add ExactResume() to the run that writes checkpoints."
            )
        elif len(self._states) != trainer.world_size:
            rank_zero_warn(
                f"ExactResume: the checkpoint was written by {len(self._states)} ranks and is "
                f"resumed on {trainer.world_size}, so the resumed run cannot repeat it."
            )
            self._states = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the state back between the making of the data iterator and its first batch."""
        states, self._states = self._states, None
        if states is None:
            return
        positions, self._positions = self._positions, []
        state = states[trainer.global_rank]
        if _inside_epoch(trainer):
            _repeat_epoch_of_samplers(trainer, positions)
        restore_rng_state(state)
        if not _inside_epoch(trainer):
            # Saved between two epochs: the next epoch's order was still to be drawn, so the
            # iterator that Lightning has just made, before this hook, has to be made again.
            for generator, saved in zip(_generators(trainer), state["loaders"], strict=False):
                generator.set_state(saved.cpu())
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def _inside_epoch(trainer: pl.Trainer) -> bool:
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(0 < done < trainer.num_training_batches)


def _repeat_epoch_of_samplers(trainer: pl.Trainer, positions: list[dict[str, Any]]) -> None:
    """Lightning makes the iterator, in epoch 0's order, before it tells samplers the epoch."""
    loaders = trainer.fit_loop._combined_loader
    samplers = [s for loader in loaders.flattened for s in _samplers(loader)] if loaders else []
    told = [s for s in samplers if callable(getattr(s, "set_epoch", None))]
    if loaders is None or not told:
        return
    for sampler in told:
        sampler.set_epoch(trainer.current_epoch)
    if positions:
        loaders._load_state_dicts(positions)
    iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)]


def _generators(trainer: pl.Trainer) -> list[torch.Generator]:
    """The generators that the training loaders own, each once."""
    loaders = trainer.fit_loop._combined_loader
    found: dict[int, torch.Generator] = {}
    for loader in loaders.flattened if loaders is not None else []:
        for owner in (loader, *_samplers(loader)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
