"""The base of callbacks that track something of the user's validation and test steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_reg.engine.capture import FORWARD, Capture
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.sampler import padding_mask
from lightning_reg.engine.signals import SignalReader, Signals
from lightning_reg.engine.step import Step
from lightning_reg.metrics.exact import ExactMetric

Stage = Literal["val", "test"]
STAGES: tuple[Stage, ...] = ("val", "test")
_HOOKS = {"val": "validation_step", "test": "test_step"}


class Monitor(Callback):
    """Owns metrics, feeds them from the user's steps, and logs them; the module is not edited.

    A subclass supplies :meth:`build_metrics`, :meth:`observe` and :meth:`read`. The base takes
    care of finding the tensors (in the same places as the techniques do, see
    :class:`~lightning_reg.engine.Signals`), of batches that belong to the sanity check, of samples
    that a DistributedSampler repeats, of several dataloaders, and of logs that reach the
    Trainer's loggers and ``callback_metrics``.

    Args:
        stages: ``"val"``, ``"test"`` or both.
        signals: where the tensors are found, if not in the usual places.

    Raises:
        ArgumentError: if a stage is unknown.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")

    def __init__(self, *, stages: Sequence[Stage] = STAGES, signals: Signals | None = None) -> None:
        super().__init__()
        unknown = [stage for stage in stages if stage not in STAGES]
        if unknown or isinstance(stages, str):
            raise ArgumentError(
                self,
                f"`stages` must be a list of {', '.join(STAGES)}, got {stages!r}",
                cure=f'{type(self).__name__}(stages=["val"])',
            )
        self.stages = tuple(stages)
        self.signals = signals
        self.results: dict[str, float] = {}
        self._metrics: dict[int, dict[str, ExactMetric]] = {}
        self._run: _Run | None = None
        self._capture: Capture | None = None
        self._loaders: list[Any] = []
        self._records: dict[str, list[Any]] = {}
        self._recording = ExitStack()

    # ------------------------------------------------------------------ what a subclass supplies

    @abstractmethod
    def build_metrics(self) -> dict[str, ExactMetric]:
        """Fresh metrics for one dataloader."""

    @abstractmethod
    def observe(
        self, metrics: Mapping[str, ExactMetric], step: Step, counted: Tensor | None
    ) -> None:
        """Update the metrics with one batch.

        Args:
            metrics: those of the batch's dataloader.
            step: what the user's step saw and returned: ``step.logits``, ``step.targets``.
            counted: (B,) False for samples that are repeats; ``None`` if all count.
        """

    @abstractmethod
    def read(self, metrics: Mapping[str, ExactMetric]) -> dict[str, Tensor]:
        """The values to log, by name; every rank calls it, with its ranks' states joined."""

    def draw(self, trainer: pl.Trainer, tag: str) -> None:
        """Write figures; every rank calls it, after :meth:`read` of one dataloader."""

    # ------------------------------------------------------------------ stages

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to watch."""
        self._start(trainer, pl_module, "val")

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record what the step calls."""
        self._record()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        self._count(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        self._report(trainer, pl_module, "val")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop to watch."""
        self._close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to watch."""
        self._start(trainer, pl_module, "test")

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record what the step calls."""
        self._record()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        self._count(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        self._report(trainer, pl_module, "test")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop to watch."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop to watch: the stage's own end does not come any more."""
        self._close()

    # ------------------------------------------------------------------ internals

    def _start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        self._close()
        if stage not in self.stages:
            return
        self._run = _Run(trainer, module, self, _HOOKS[stage])
        self._capture = Capture()
        self._capture.attach(module, self._run.reader(self).layers())
        loaders = trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders
        loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
        self._loaders = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
        # Made for all dataloaders on all ranks, though a rank may have no batch of one: reading
        # them is a collective.
        self._metrics = {
            index: {name: m.to(module.device) for name, m in self.build_metrics().items()}
            for index in range(len(self._loaders))
        }

    def _record(self) -> None:
        self._recording.close()
        if self._capture is not None:
            self._records = self._recording.enter_context(self._capture.recording())

    def _count(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if self._run is None:
            return
        self._recording.close()
        step = Step(self._run, batch, batch_idx)  # type: ignore[arg-type]
        step.hook = self._run.hook
        step.outputs = outputs
        step.records = self._user_calls(trainer, module)
        step.asked_by(self)  # type: ignore[arg-type]
        self.observe(self._metrics[dataloader_idx], step, self._counted(step, dataloader_idx))

    def _user_calls(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, list[Any]]:
        records = dict(self._records)
        if trainer.strategy.model is not module and records.get(FORWARD):
            # A wrapper (DDP) calls the user's step through the module itself: that call is not
            # one of the step's own.
            records[FORWARD] = records[FORWARD][:-1]
        return records

    def _counted(self, step: Step, dataloader_idx: int) -> Tensor | None:
        loader = self._loaders[dataloader_idx]
        size = len(step.logits)
        repeated = padding_mask(loader, step.batch_idx, size, step.logits.device)
        return None if repeated is None else ~repeated

    def _report(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        # The sanity check's batches are fed too, so that a tensor that is not found is an error
        # before the first epoch; nothing of them is reported, and the next start makes new metrics.
        if self._run is None or trainer.sanity_checking:
            return
        for index, metrics in self._metrics.items():
            suffix = f"/dataloader_idx_{index}" if len(self._metrics) > 1 else ""
            with _joined(metrics):
                for metric in metrics.values():
                    metric.warn_of_invalid()
                values = self.read(metrics)
            for name, value in values.items():
                key = f"{stage}/{name}{suffix}"
                self.results[key] = float(value)
                # The ranks hold the same number; their maximum is that number, bit for bit.
                module.log(
                    key, value.float(), sync_dist=True, reduce_fx="max", add_dataloader_idx=False
                )
            self.draw(trainer, stage + suffix)

    def _close(self) -> None:
        self._recording.close()
        if self._capture is not None:
            self._capture.detach()
        self._run, self._capture = None, None
        self._loaders, self._records = [], {}

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a run that is under way is not part of a copy.
        fresh: dict[str, Any] = {"_run": None, "_capture": None, "_loaders": [], "_records": {}}
        return {**self.__dict__, **fresh, "_recording": ExitStack()}


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


def _joined(metrics: Mapping[str, ExactMetric]) -> ExitStack:
    """Within it, the metrics' states are those of all ranks."""
    stack = ExitStack()
    for metric in metrics.values():
        stack.enter_context(metric.sync_context())
    return stack
