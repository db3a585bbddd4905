"""Finds a weight decay and a peak learning rate by short runs of rising learning rate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_reg.engine import ArgumentError, Communicator, RegularizationError
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.random import restore_rng_state, rng_state

__all__ = ["RangeTest", "RangeTestCurve", "weight_decay_range_test"]

_NAME = "weight_decay_range_test"
_CURE = f"{_NAME}(module, loader, trainer=lambda **settings: Trainer(**settings))"
# What a short run needs of a Trainer, and what it should leave alone.
_SETTINGS: dict[str, Any] = {
    "max_epochs": -1,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class RangeTestCurve:
    """One run of rising learning rate.

    Attributes:
        weight_decay: its weight decay.
        lrs: the learning rate of each step, of the first parameter group.
        losses: the training loss of each step, averaged over ranks.
        smoothed: an exponential average of them, corrected for its beginning.
    """

    weight_decay: float
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    @property
    def lowest(self) -> int:
        """The step with the lowest smoothed loss."""
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)


@dataclass(frozen=True)
class RangeTest:
    """What the runs say.

    Attributes:
        curves: one for each weight decay, in the order in which they were given.
        tolerance: how much of the best run's fall in loss a run may miss.
    """

    curves: tuple[RangeTestCurve, ...]
    tolerance: float

    @property
    def chosen(self) -> RangeTestCurve:
        """The run of the largest weight decay whose loss falls as far as that of the best."""
        best = min(c.smoothed[c.lowest] for c in self.curves)
        start = max(c.smoothed[0] for c in self.curves)
        allowed = best + self.tolerance * max(0.0, start - best)
        good = [c for c in self.curves if c.smoothed[c.lowest] <= allowed]
        return max(good, key=lambda c: c.weight_decay)

    @property
    def weight_decay(self) -> float:
        """The weight decay to train with."""
        return self.chosen.weight_decay

    @property
    def max_lr(self) -> float:
        """The largest learning rate up to which its loss fell: the peak for ``OneCycle``."""
        return self.chosen.lrs[self.chosen.lowest]


def weight_decay_range_test(
    module: pl.LightningModule,
    train_dataloaders: Any = None,
    *,
    trainer: Callable[..., pl.Trainer] = pl.Trainer,
    datamodule: pl.LightningDataModule | None = None,
    weight_decays: Sequence[float] = (1e-3, 1e-4, 1e-5, 0.0),
    min_lr: float = 1e-5,
    max_lr: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    stop: float = 4.0,
    tolerance: float = 0.05,
) -> RangeTest:
    """Learning rate range tests at several weight decays (balanced regularization).

    Smith (2018), A disciplined approach to neural network hyper-parameters: Part 1 -- learning
    rate, batch size, momentum, and weight decay, arXiv:1803.09820.

    In each run the learning rate rises by equal factors from ``min_lr`` to ``max_lr``. The best
    weight decay is the largest with which the loss still falls as far as with any, since the
    amounts of regularization by the learning rate, by weight decay and by everything else have to
    balance: run it with the techniques, the batch size and the momentum of the training itself. The
    candidates are the paper's for deep networks; it looks at validation losses by eye, this at
    training losses by the rule above, which is ours.

    The module and its data are left as they are: every run trains a copy, from the same weights and
    the same random numbers, with optimizers that ``configure_optimizers`` makes for it. Where some
    parameter groups have a weight decay and others 0 (biases, norms), those at 0 keep it; ratios
    of learning rates between groups are kept.

    Args:
        module: what is to be trained.
        train_dataloaders: as for ``Trainer.fit``.
        trainer: makes the Trainer of a run from the keyword arguments that it gets, with whatever
            else the training has: ``lambda **settings: Trainer(callbacks=[SAM()], **settings)``.
            Fresh techniques each time; none that sets the learning rate.
        datamodule: in place of ``train_dataloaders``.
        weight_decays: the candidates, at least 0.
        min_lr: where each run begins, above 0.
        max_lr: where it would end.
        steps: optimizer steps of a run, at least 2.
        smoothing: of the loss, in [0, 1).
        stop: a run ends where its smoothed loss is this many times the lowest one, above 1, or not
            finite.
        tolerance: the share of the best run's fall in loss that a run may miss, in [0, 1).

    Returns:
        The curves, and of the chosen one ``weight_decay`` and ``max_lr``.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: if an optimizer has no weight decay, something else sets the learning
            rate, or a loss is not finite from the first step on.

    Note:
        Call it on all ranks, before the training; losses are averaged over ranks, so that all come
        to the same answer. Cost: ``len(weight_decays) * steps`` training steps and a copy of the
        module.

    Example:
        >>> from lightning_reg.functional import weight_decay_range_test
        >>> found = weight_decay_range_test(module, loader)  # doctest: +SKIP
        >>> found.weight_decay, found.max_lr  # doctest: +SKIP
        (0.0001, 0.35)
    """
    _check(weight_decays, min_lr, max_lr, steps, smoothing, stop, tolerance)
    lrs = [min_lr * (max_lr / min_lr) ** (i / (steps - 1)) for i in range(steps)]
    devices = [torch.device("cuda", torch.cuda.current_device())] if _on_cuda() else []
    before, curves = rng_state(devices), []
    for weight_decay in weight_decays:
        sweep = _Sweep(weight_decay, lrs, smoothing, stop)
        run = trainer(**_SETTINGS, max_steps=steps)
        run.callbacks.append(sweep)  # type: ignore[attr-defined]
        try:
            run.fit(copy.deepcopy(module), train_dataloaders, datamodule=datamodule)
        finally:
            restore_rng_state(before)
        curves.append(sweep.curve())
    return RangeTest(tuple(curves), tolerance)


class _Sweep(Callback):
    """Raises the learning rate at a fixed weight decay and keeps the losses."""

    def __init__(
        self, weight_decay: float, lrs: Sequence[float], smoothing: float, stop: float
    ) -> None:
        self.weight_decay, self.lrs = weight_decay, lrs
        self.smoothing, self.stop = smoothing, stop
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._average = 0.0
        self._ratios: list[tuple[dict[str, Any], float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the weight decay."""
        groups = [group for opt in trainer.optimizers for group in opt.param_groups]
        if not all("weight_decay" in group for group in groups):
            raise RegularizationError(
                _NAME,
                "tries weight decays, and the module has an optimizer without one",
                cure="torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)",
            )
        selective = any(group["weight_decay"] > 0 for group in groups)
        for group in groups:
            if group["weight_decay"] > 0 or not selective:
                group["weight_decay"] = self.weight_decay
        first = float(groups[0]["lr"]) or 1.0
        self._ratios = [(group, float(group["lr"]) / first) for group in groups]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rate of this step."""
        rate = self._rate(trainer)
        for group, ratio in self._ratios:
            group["lr"] = rate * ratio

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Refuse whatever else sets the learning rate."""
        rate = self._rate(trainer)
        if any(group["lr"] != rate * ratio for group, ratio in self._ratios):
            raise RegularizationError(
                _NAME,
                "raises the learning rate, and a callback of the Trainer sets another one",
                cure="trainer=lambda **settings: Trainer(**settings)  # without OneCycle",
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the loss; stop where it has grown."""
        loss = outputs["loss"].detach().float() * trainer.accumulate_grad_batches
        value = float(Communicator.of(trainer).reduce(loss, "mean"))
        self._average = self.smoothing * self._average + (1 - self.smoothing) * value
        smoothed = self._average / (1 - self.smoothing ** (len(self.losses) + 1))
        grown = self.smoothed and smoothed > self.stop * min(self.smoothed)
        if not math.isfinite(smoothed) or grown:
            trainer.should_stop = True
            # The rest of the epoch goes as well, which `should_stop` alone would wait for.
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
            return
        self.losses.append(value)
        self.smoothed.append(smoothed)

    def curve(self) -> RangeTestCurve:
        """What was kept."""
        if not self.losses:
            raise RegularizationError(
                _NAME,
                f"has a loss that is not finite in the first step at weight decay "
                f"{self.weight_decay}",
                cure=f"{_NAME}(module, loader, min_lr=1e-7)",
            )
        lrs = tuple(self.lrs[: len(self.losses)])
        return RangeTestCurve(self.weight_decay, lrs, tuple(self.losses), tuple(self.smoothed))

    def _rate(self, trainer: pl.Trainer) -> float:
        return self.lrs[min(int(trainer.global_step), len(self.lrs) - 1)]


def _on_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _check(
    weight_decays: Sequence[float],
    min_lr: float,
    max_lr: float,
    steps: int,
    smoothing: float,
    stop: float,
    tolerance: float,
) -> None:
    if not weight_decays:
        raise ArgumentError(_NAME, "`weight_decays` is empty", cure=_CURE)
    for weight_decay in weight_decays:
        check_range(_NAME, "weight_decays", weight_decay, 0, cure=_CURE)
    check_range(_NAME, "min_lr", min_lr, 0, low_open=True, cure=_CURE)
    check_range(_NAME, "max_lr", max_lr, min_lr, low_open=True, cure=_CURE)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        raise ArgumentError(
            _NAME, f"`steps` must be a whole number from 2, got {steps!r}", cure=_CURE
        )
    check_range(_NAME, "smoothing", smoothing, 0, 1, high_open=True, cure=_CURE)
    check_range(_NAME, "stop", stop, 1, low_open=True, cure=_CURE)
    check_range(_NAME, "tolerance", tolerance, 0, 1, high_open=True, cure=_CURE)
