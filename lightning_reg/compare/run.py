"""One training, and what came of it."""

from __future__ import annotations

import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_reg.compare.data import SmallData
from lightning_reg.compare.model import SmallNet
from lightning_reg.compare.settings import BASELINE, Settings
from lightning_reg.compare.specs import parse_arm, parse_class
from lightning_reg.engine.errors import RegularizationError
from lightning_reg.engine.memory import IndexedDataset
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.monitors.calibration import CalibrationMonitor

METRICS = ("accuracy", "nll", "ece", "entropy")
_WARM_UP = 5


@dataclass(frozen=True)
class Job:
    """One training of a comparison.

    Attributes:
        arm: the techniques as they were written, or :data:`BASELINE`.
        seed: from 0.
    """

    settings: Settings
    arm: str
    seed: int


@dataclass(frozen=True)
class Run:
    """What one training gave: on the held-out set, after its last epoch.

    Attributes:
        values: by name, of :data:`METRICS`.
        curves: the same after each epoch.
        step_ms: the median time of a training step.
        bins: rows of counts, confidence sums and correctness sums.
    """

    arm: str
    seed: int
    values: dict[str, float]
    curves: list[dict[str, float]]
    step_ms: float
    bins: tuple[list[float], list[float], list[float]]
    settings: Settings = field(repr=False)


def train(job: Job, on_epoch: Callable[[], None] | None = None, **trainer: Any) -> Run:
    """Train once.

    Args:
        job: what.
        on_epoch: called after each epoch.
        trainer: arguments of the Trainer that take the place of the usual ones.
    """
    settings = job.settings
    monitor = CalibrationMonitor(figures=False, stages=["val"])
    curves, timer = Curves(monitor, on_epoch), StepTimer()
    with _quiet(), _threads(settings), _seeded(job.seed):
        module, data = build(job)
        techniques = build_techniques(job.arm, data, module)
        make = trainer.pop("make", pl.Trainer)
        run = make(
            callbacks=[*techniques, monitor, curves, timer],
            **{**_trainer_settings(settings), **trainer},
        )
        run.fit(module, datamodule=data)
    if not curves.epochs:
        raise RegularizationError(
            "lightning-reg compare",
            f"{type(data).__name__} gave no validation batch, so there is nothing to compare",
            cure="def val_dataloader(self): return DataLoader(held_out, batch_size=64)",
        )
    bins = monitor.reliability[next(iter(monitor.reliability))]
    return Run(
        arm=job.arm,
        seed=job.seed,
        values=curves.epochs[-1],
        curves=curves.epochs,
        step_ms=timer.median_ms(),
        bins=(bins.counts.tolist(), bins.confidence_sum.tolist(), bins.correct_sum.tolist()),
        settings=settings,
    )


def build(job: Job) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """The module and its data: the user's own, or the small ones."""
    settings = job.settings
    if settings.module is not None and settings.datamodule is not None:
        data = parse_class(settings.datamodule).build()
        return parse_class(settings.module).build(), data
    # A data set that knows positions gives another kind of batch, which techniques undo.
    data = SmallData(
        settings.data,
        label_noise=settings.label_noise,
        train_fraction=settings.train_fraction,
        batch_size=settings.batch_size // settings.devices,
        seed=job.seed,
        indexed=job.arm != BASELINE,
    )
    return SmallNet(data.num_features, data.num_classes, lr=settings.lr), data


def build_techniques(
    arm: str, data: pl.LightningDataModule, module: pl.LightningModule
) -> list[Callback]:
    """The callbacks of an arm."""
    if arm == BASELINE:
        # Someone has to take the positions off the batch of a data set that is indexed.
        return [Regularizer(0.0, name="baseline")] if _is_indexed(data) else []
    known = {
        name: getattr(data, name, getattr(module, name, None))
        for name in ("num_classes", "num_samples")
    }
    return [spec.build(known) for spec in parse_arm(arm)]


class Curves(Callback):
    """Keeps the monitor's values after each epoch."""

    def __init__(self, monitor: CalibrationMonitor, on_epoch: Callable[[], None] | None) -> None:
        self.monitor = monitor
        self.on_epoch = on_epoch
        self.epochs: list[dict[str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep them; of several dataloaders the first counts."""
        results = self.monitor.results
        keys = {name: (f"val/{name}", f"val/{name}/dataloader_idx_0") for name in METRICS}
        self.epochs.append(
            {
                name: results[one] if one in results else results[other]
                for name, (one, other) in keys.items()
            }
        )
        if self.on_epoch is not None:
            self.on_epoch()


class StepTimer(Callback):
    """The time between the hooks around a training step, which include all techniques."""

    def __init__(self) -> None:
        self._start = 0.0
        self._times: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._start = self._now(pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop it."""
        self._times.append(self._now(pl_module) - self._start)

    def median_ms(self) -> float:
        """The median after the first steps, which warm up; NaN without a step."""
        times = self._times[_WARM_UP:] or self._times
        return 1e3 * statistics.median(times) if times else float("nan")

    @staticmethod
    def _now(module: pl.LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return time.perf_counter()


def _trainer_settings(settings: Settings) -> dict[str, Any]:
    return {
        "max_epochs": settings.epochs,
        "accelerator": settings.accelerator,
        "devices": settings.devices,
        "strategy": settings.strategy,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }


def _is_indexed(data: pl.LightningDataModule) -> bool:
    if isinstance(data, SmallData):
        return False
    data.prepare_data()
    data.setup("fit")
    return isinstance(getattr(data.train_dataloader(), "dataset", None), IndexedDataset)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The same weights and draws for all arms; the environment is left as it was."""
    before = {k: v for k, v in os.environ.items() if k.startswith("PL_")}
    pl.seed_everything(seed, verbose=False)
    try:
        yield
    finally:
        for key in [k for k in os.environ if k.startswith("PL_") and k not in before]:
            del os.environ[key]
        os.environ.update(before)


@contextmanager
def _threads(settings: Settings) -> Iterator[None]:
    """The small network's layers are too small to be split: threads would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if settings.module is None else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines about devices and workers, which would hide the progress bar."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", module=r"torch\..*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
