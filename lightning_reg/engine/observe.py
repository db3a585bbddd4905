"""Finds the signals of a user's step outside of the training pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.capture import Capture
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.sampler import padding_mask
from lightning_reg.engine.signals import SignalReader, Signals
from lightning_reg.engine.step import Step

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_reg.engine.regularizer import Regularizer

_COLLECTIONS = (list, dict, set)


class StepWatcher:
    """A callback that is shown each training step while techniques act on it.

    The pipeline of a Trainer's techniques shows the step once, after the user's ``training_step``
    has run and before any second pass, with the signals as the user's step saw and returned them.
    Without techniques there is no pipeline, and the callback has hooks of its own for that.

    Attributes:
        name: under which the pipeline finds where this callback looks for signals.
        signals: where that is, if not in the usual places.
    """

    name: str
    signals: Signals | None

    def watch(self, step: Step) -> None:
        """See one training step; nothing may be changed."""
        raise NotImplementedError


class Observer:
    """Runs a step of the user's and gives the :class:`Step` in which its signals are found.

    For techniques that act where no pipeline is: in a test, or on data between two fits.

    Args:
        technique: for whom signals are looked up.
        trainer: the Trainer of the run.
        module: the user's module.
        hook: the step's name, for messages.
    """

    def __init__(
        self,
        technique: Regularizer,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        hook: str,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.hook = hook
        self.comm = Communicator.of(trainer)
        self._technique = technique
        self._reader = SignalReader(technique, module)
        self._capture = Capture()
        self._capture.attach(module, self._reader.layers())

    def reader(self, technique: Regularizer) -> SignalReader:
        """Where the technique looks."""
        return self._reader

    def observe(self, run: Callable[[Any], Any], batch: Any, batch_idx: int = 0) -> Step:
        """Call ``run`` with the batch as the user's step sees it.

        Args:
            run: the user's step; gets the batch without the index of an ``IndexedDataset``.
            batch: the batch.
            batch_idx: its position.
        """
        step = Step(self, batch, batch_idx)  # type: ignore[arg-type]
        step.hook = self.hook
        with self._capture.recording() as records:
            step.outputs = run(step.batch)
        step.records = records
        return step.asked_by(self._technique)

    def close(self) -> None:
        """Stop to watch the module."""
        self._capture.detach()


def held_out_steps(
    technique: Regularizer, trainer: pl.Trainer, module: pl.LightningModule, loader: Any
) -> Iterator[tuple[Step, Tensor | None]]:
    """Runs ``self(inputs)`` over held-out data, in evaluation mode and without gradients.

    A loader without a DistributedSampler is run by every rank, as sharded weights need, and each
    rank is given every world-size-th batch of it.

    Args:
        technique: for whom signals are looked up.
        trainer: the Trainer of the run.
        module: the user's module.
        loader: the held-out data.

    Yields:
        The step of each batch of this rank's share, and (B,) False for samples that a sampler
        repeats, or ``None`` if all count.
    """
    observer = Observer(technique, trainer, module, "forward")
    comm = observer.comm
    spread = hasattr(getattr(loader, "sampler", None), "num_replicas")

    def forward(batch: Any) -> Any:
        step = Step(observer, batch, 0)  # type: ignore[arg-type]
        step.hook = observer.hook
        return module(step.asked_by(technique).inputs)

    try:
        with evaluating(module), torch.no_grad(), trainer.precision_plugin.forward_context():
            for index, given in enumerate(loader):
                converted = trainer.precision_plugin.convert_input(given)
                batch = trainer.strategy.batch_to_device(converted, dataloader_idx=0)
                step = observer.observe(forward, batch, index)
                if spread or index % comm.world_size == comm.rank:
                    logits = step.logits
                    repeated = padding_mask(loader, index, len(logits), logits.device)
                    yield step, None if repeated is None else ~repeated
    finally:
        observer.close()


def validation_loaders(trainer: pl.Trainer) -> list[Any]:
    """The Trainer's validation dataloaders; none before it has made any."""
    loaders = trainer.val_dataloaders
    if loaders is None:
        return []
    loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode; afterwards each in the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def sparing_collections(module: nn.Module) -> Iterator[None]:
    """Lists, dicts and sets in which a step collects things are afterwards as they were."""
    kept = [
        (part, {n: v for n, v in vars(part).items() if n[0] != "_" and type(v) in _COLLECTIONS})
        for part in module.modules()
    ]
    for part, values in kept:
        part.__dict__.update({name: copy.copy(value) for name, value in values.items()})
    try:
        yield
    finally:
        for part, values in kept:
            part.__dict__.update(values)


__all__ = [
    "Observer",
    "StepWatcher",
    "evaluating",
    "held_out_steps",
    "sparing_collections",
    "validation_loaders",
]
