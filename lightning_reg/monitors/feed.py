"""Turns a user's step into the :class:`Step` in which a monitor finds its tensors."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_reg.engine.capture import FORWARD, Capture
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.signals import SignalReader
from lightning_reg.engine.step import Step

if TYPE_CHECKING:
    from lightning_reg.monitors.monitor import Monitor


class _Run:
    """What a :class:`Step` asks of the run it belongs to."""

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, monitor: Monitor, hook: str
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.hook = hook
        self.comm = Communicator.of(trainer)
        self._reader = SignalReader(monitor, module)  # type: ignore[arg-type]

    def reader(self, technique: Any) -> SignalReader:
        return self._reader


class StepFeed:
    """Watches the module between the hooks around the user's steps of one stage.

    Args:
        monitor: for whom signals are looked up; ``monitor.layers`` are watched, too.
        trainer: the Trainer of the run.
        module: the user's module.
        hook: the step's name, for messages.
    """

    def __init__(
        self, monitor: Monitor, trainer: pl.Trainer, module: pl.LightningModule, hook: str
    ) -> None:
        self._monitor = monitor
        self._run = _Run(trainer, module, monitor, hook)
        self._capture = Capture()
        self._capture.attach(module, {*self._run.reader(monitor).layers(), *monitor.layers})
        self._records: dict[str, list[Any]] = {}
        self._recording = ExitStack()

    def start_batch(self) -> None:
        """Record what the step calls from now on."""
        self._recording.close()
        self._records = self._recording.enter_context(self._capture.recording())

    def end_batch(self, outputs: Any, batch: Any, batch_idx: int) -> Step:
        """The step that has run since."""
        self._recording.close()
        step = Step(self._run, batch, batch_idx)  # type: ignore[arg-type]
        step.hook = self._run.hook
        step.outputs = outputs
        step.records = self._user_calls()
        self._records = {}
        return step.asked_by(self._monitor)  # type: ignore[arg-type]

    def close(self) -> None:
        """Stop to watch the module."""
        self._recording.close()
        self._capture.detach()
        self._records = {}

    def _user_calls(self) -> dict[str, list[Any]]:
        records = dict(self._records)
        if self._run.trainer.strategy.model is not self._run.module and records.get(FORWARD):
            # A wrapper (DDP) calls the user's step through the module itself: that call is not
            # one of the step's own.
            records[FORWARD] = records[FORWARD][:-1]
        return records
