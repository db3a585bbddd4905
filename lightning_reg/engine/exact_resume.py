"""Saves the global random state, so that a resumed run goes on bit for bit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_reg.engine.random import restore_rng_state, rng_state

_KEY = "lightning_reg.exact_resume"
_ORDERS = "lightning_reg.sampler_orders"


class ExactResume(Callback):
    """Saves every rank's global random state in checkpoints and goes on from it on resume.

    Lightning restores weights, optimizers and loops, but not the generators that dropout and
    shuffling draw from. With this callback, and torchdata's ``StatefulDataLoader`` for the
    position in the data, a run that was stopped inside an epoch and resumed trains the same bits
    as one that was not (same machine, same versions, same number of ranks). On another number of
    ranks a warning says what cannot be exact.

    Saved are torch's CPU generator, the accelerator's, Python's ``random`` and numpy's, on each
    rank, and the order of an epoch where Lightning deals the draws of a random sampler to ranks.
    The techniques of this package draw from streams of their own and need nothing saved.

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
        self._resumes = False
        self._states: list[dict[str, Any]] | None = None
        self._positions: list[dict[str, Any]] = []
        self._orders: list[Tensor] = []

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
        # All ranks share one order, of which each takes its part, so one copy is enough.
        drawn = [wrapped._sampler_list for wrapped in _wrapped_samplers(trainer)]
        checkpoint[_ORDERS] = [torch.tensor(order or []) for order in drawn]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep this rank's state until the moment at which it was taken comes again."""
        self._resumes = True
        self._states = checkpoint.get(_KEY)
        self._positions = (
            checkpoint.get("loops", {})
            .get("fit_loop", {})
            .get("state_dict", {})
            .get("combined_loader", [])
        )
        self._orders = checkpoint.get(_ORDERS, [])
        if self._states is None:
            rank_zero_warn(
                "ExactResume: the checkpoint holds no random state, so the resumed run will not "
                "repeat the original one. Add ExactResume() to the run that writes checkpoints."
            )
        elif len(self._states) != trainer.world_size:
            rank_zero_warn(
                f"ExactResume: the checkpoint was written by {len(self._states)} ranks and is "
                f"resumed on {trainer.world_size}. Weights, optimizers and what techniques "
                "remember go on. What cannot be exact: draws of the global random generators and, "
                "unless the joint batch is as large as it was, which samples are still to come in "
                "an epoch that was broken off."
            )
            self._states = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the state back between the making of the data iterator and its first batch."""
        if not self._resumes:
            return
        self._resumes = False
        states, self._states = self._states, None
        positions, self._positions = self._positions, []
        orders, self._orders = self._orders, []
        # Lightning makes the iterator, in epoch 0's order, before it tells samplers the epoch.
        told = _tell_epoch(trainer)
        if _inside_epoch(trainer):
            if told:
                at = positions if states is not None else _in_batches(trainer, positions)
                _repeat_epoch(trainer, at, orders)
            _restore(trainer, states)
        else:
            # Saved between two epochs: the next epoch's order was still to be drawn, so the
            # iterator that Lightning has just made, before this hook, has to be made again.
            _restore(trainer, states)
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def _inside_epoch(trainer: pl.Trainer) -> bool:
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(0 < done < trainer.num_training_batches)


def _restore(trainer: pl.Trainer, states: list[dict[str, Any]] | None) -> None:
    if states is None:
        return
    state = states[trainer.global_rank]
    restore_rng_state(state)
    for generator, saved in zip(_generators(trainer), state["loaders"], strict=False):
        generator.set_state(saved.cpu())


def _tell_epoch(trainer: pl.Trainer) -> bool:
    """Tell the samplers which epoch it is; whether any wants to know."""
    samplers = [s for s in _all_samplers(trainer) if callable(getattr(s, "set_epoch", None))]
    for sampler in samplers:
        sampler.set_epoch(trainer.current_epoch)
    return bool(samplers)


def _repeat_epoch(
    trainer: pl.Trainer, positions: list[dict[str, Any]], orders: list[Tensor]
) -> None:
    """Make the iterator again, in the order of the epoch that was broken off."""
    loaders = trainer.fit_loop._combined_loader
    if positions and loaders is not None:
        loaders._load_state_dicts(positions)
    pairs = list(zip(_wrapped_samplers(trainer), orders, strict=False))
    drawing = [wrapped._sampler for wrapped, _ in pairs]
    for wrapped, order in pairs:
        wrapped._sampler = order.tolist()
    iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
    for (wrapped, _), sampler in zip(pairs, drawing, strict=True):
        wrapped._sampler = sampler


def _in_batches(trainer: pl.Trainer, positions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Positions of other ranks' loaders, whose batches may have had another size.

    torchdata counts samples, Lightning batches. By batches the samples that follow are right
    where the joint batch is what it was, and both count alike in any case.
    """
    loaders = trainer.fit_loop._combined_loader
    # Not by truth: the length of loaders is not to be had outside a fit.
    flat = loaders.flattened if loaders is not None else []
    sizes = [getattr(loader, "batch_size", None) for loader in flat]
    return [_rebased(p, size) for p, size in zip(positions, sizes, strict=False)]


def _rebased(state: Any, batch_size: int | None) -> Any:
    if not isinstance(state, dict) or batch_size is None:
        return state
    state = {key: _rebased(value, batch_size) for key, value in state.items()}
    position = state.get("_sampler_iter_state")
    if isinstance(position, dict) and "samples_yielded" in position:
        position["samples_yielded"] = state["_sampler_iter_yielded"] * batch_size
    return state


def _all_samplers(trainer: pl.Trainer) -> list[Any]:
    loaders = trainer.fit_loop._combined_loader
    flat = loaders.flattened if loaders is not None else []
    return [s for loader in flat for s in _samplers(loader)]


def _wrapped_samplers(trainer: pl.Trainer) -> list[Any]:
    """What Lightning deals to ranks of samplers that draw (those of torchdata, weighted ones)."""
    inner = [getattr(sampler, "dataset", None) for sampler in _all_samplers(trainer)]
    found = [i for i in inner if hasattr(i, "_sampler") and hasattr(i, "_sampler_list")]
    return list({id(wrapped): wrapped for wrapped in found}.values())


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)]


def _generators(trainer: pl.Trainer) -> list[torch.Generator]:
    """The generators that the training loaders own, each once."""
    loaders = trainer.fit_loop._combined_loader
    found: dict[int, torch.Generator] = {}
    for loader in loaders.flattened if loaders is not None else []:
        drawing = [
            getattr(getattr(s, "dataset", None), "_sampler", None) for s in _samplers(loader)
        ]
        for owner in (loader, *_samplers(loader), *drawing):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
