"""Trains a host with a technique or without, and keeps what can be compared."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.testing.hosts import BATCH, SAMPLES, HostOptions
from lightning_reg.testing.ranks import rank_trainer
from lightning_reg.testing.snapshot import copies, tensors_of

SEED = 11
# So large that an effect which forgets the scale is off by orders of magnitude, and so small
# that no gradient of the hosts overflows.
FP16_SCALE = 2.0**10
DEFAULT = HostOptions()
_LOGGERS = (
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
)


@dataclass(frozen=True)
class Setting:
    """One way to train a host.

    Args:
        options: the variant of the host.
        batch: samples in a micro-batch, on each rank.
        samples: the length of the dataset.
        epochs: passes over it.
        accumulate: micro-batches to an optimizer step.
        precision: of the Trainer.
        shuffle: whether the samples come in another order each epoch.
        strategy: over ranks.
    """

    options: HostOptions = DEFAULT
    batch: int = BATCH
    samples: int = SAMPLES
    epochs: int = 1
    accumulate: int = 1
    precision: str = "32-true"
    shuffle: bool = False
    strategy: str = "ddp"


@dataclass
class Outcome:
    """What a run leaves: tensors and primitives only, so that ranks can send it.

    Attributes:
        weights: parameters by name; of a test, those that the last batch left.
        buffers: buffers by name.
        start: the parameters before.
        optimizer: the optimizers' tensors, in the parameters' order.
        state: the technique's ``state_dict``, taken while it was at work.
        metrics: ``trainer.callback_metrics``.
        seen: loss and logits of each micro-batch, as the host saw them.
        counted: the samples that the host's metric counted.
    """

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    start: dict[str, Tensor]
    optimizer: list[Tensor] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    counted: int = 0


class Run:
    """A module, callbacks, data and a Trainer, ready to go.

    Args:
        module: what is trained.
        loader: its data.
        setting: how.
        technique: the technique among the callbacks, whose state is kept.
        callbacks: all of them, the technique included.
        stage: ``"fit"`` or ``"test"``.
        distributed: on the ranks that :class:`RankPair` runs this on.
        trainer: further settings of the Trainer.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        loader: Any,
        setting: Setting,
        technique: Regularizer | None,
        callbacks: Sequence[Callback],
        *,
        stage: str = "fit",
        distributed: bool = False,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        self.module, self.loader, self.technique = module, loader, technique
        self.stage = stage
        self._keeper = StateKeeper(technique)
        make = rank_trainer if distributed else pl.Trainer
        settings = {**_trainer_settings(setting), **(trainer or {})}
        if distributed:
            settings.setdefault("strategy", setting.strategy)
        settings["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in callbacks)
        with quiet():
            self.trainer = make(callbacks=[*callbacks, self._keeper], **settings)

    def go(self, **fit: Any) -> Outcome:
        """Train (or test), and keep the results."""
        start = copies(self.module.named_parameters())
        torch.manual_seed(SEED)
        with quiet():
            if self.stage == "test":
                self.trainer.test(self.module, self.loader, verbose=False)
            else:
                self.trainer.fit(self.module, self.loader, **fit)
        return self._outcome(start)

    def _outcome(self, start: dict[str, Tensor]) -> Outcome:
        module, trainer = self.module, self.trainer
        states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
        counted = getattr(module, "counted", None)
        return Outcome(
            weights=self._keeper.weights or copies(module.named_parameters()),
            buffers=copies(module.named_buffers()),
            start=start,
            optimizer=[v.detach().clone() for s in states for v in tensors_of(s).values()],
            state=self._keeper.state,
            metrics={key: float(value) for key, value in trainer.callback_metrics.items()},
            seen=list(getattr(module, "seen", ())),
            counted=0 if counted is None else int(counted.samples),
        )


class StateKeeper(Callback):
    """Takes the technique's state while it is at work: closing a fit may drop it."""

    def __init__(self, technique: Regularizer | None) -> None:
        self._technique = technique
        self.state: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At the end of a fit."""
        self._keep()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At the end of a test, before the module gets its own weights back."""
        self._keep()
        self.weights = copies(pl_module.named_parameters())

    def _keep(self) -> None:
        if self._technique is not None:
            self.state = copy.deepcopy(dict(self._technique.state_dict()))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the Trainer's advice on workers and devices."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for text in (r".*many workers", r".*logging interval", r".*GPU available"):
                warnings.filterwarnings("ignore", text)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trainer_settings(setting: Setting) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": setting.epochs,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "accumulate_grad_batches": setting.accumulate,
    }
    if setting.precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=FP16_SCALE)
        return {**settings, "plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    return {**settings, "precision": setting.precision}
