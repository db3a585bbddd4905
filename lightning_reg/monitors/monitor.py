"""The base of callbacks that track something of the user's validation and test steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, RegularizationError
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.stages import fitting
from lightning_reg.engine.step import Step
from lightning_reg.metrics.additive import join_states
from lightning_reg.metrics.exact import ExactMetric
from lightning_reg.monitors.feed import StepFeed, _Run
from lightning_reg.monitors.figures import Drawing, have_matplotlib, write_figure
from lightning_reg.monitors.joint_log import log_joint
from lightning_reg.monitors.predictions import counted_rows
from lightning_reg.monitors.record import Entry, Record, states_of, with_states

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stage = Literal["val", "test"]
STAGES: tuple[Stage, ...] = ("val", "test")
_HOOKS = {"val": "validation_step", "test": "test_step"}


class Monitor(Callback):
    """Owns metrics, feeds them from the user's steps, and logs them; the module is not edited.

    A subclass supplies :meth:`build_metrics`, :meth:`observe` and :meth:`read`, and for figures
    their names and :meth:`drawing`. The base takes care of

    - finding the tensors, in the same places as the techniques do (:class:`Signals`);
    - the sanity check's batches, samples that a DistributedSampler repeats, several dataloaders;
    - logs that reach the Trainer's loggers and ``callback_metrics``;
    - memory: the joined states that were read last and the values of each validation are saved
      with checkpoints, and figures are drawn from them: :meth:`figure` needs no samples.

    Args:
        stages: ``"val"``, ``"test"`` or both.
        figures: names of figures to draw; ``True`` for the usual ones, ``False`` for none, ``None``
            for the usual ones if matplotlib is installed.
        every_n_epochs: draw at each n-th epoch of a fit.
        signals: where the tensors are found, if not in the usual places.

    Raises:
        ArgumentError: if an argument is outside its range.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")
    layers: tuple[str, ...] = ()
    figure_names: ClassVar[tuple[str, ...]] = ()
    usual_figures: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        stages: Sequence[Stage] = STAGES,
        figures: bool | Sequence[str] | None = None,
        every_n_epochs: int = 1,
        signals: Signals | None = None,
    ) -> None:
        super().__init__()
        self._check(stages, figures, every_n_epochs)
        self.stages = tuple(stages)
        self.figures = figures
        self.every_n_epochs = every_n_epochs
        self.signals = signals
        self.record = Record()
        self._metrics: dict[int, dict[str, ExactMetric]] = {}
        self._feed: StepFeed | None = None
        self._finished = False
        self._loaders: list[Any] = []

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

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[ExactMetric]:
        """Count what is left, once every batch was seen; all metrics that are to be joined now."""
        return [metric for metrics in self._metrics.values() for metric in metrics.values()]

    @abstractmethod
    def read(self, metrics: Mapping[str, ExactMetric]) -> dict[str, Tensor]:
        """The values to log, by name; every rank calls it, with its ranks' states joined."""

    def drawing(self, name: str, tag: str, metrics: Mapping[str, ExactMetric]) -> Drawing:
        """Draw a figure from metrics that hold the states of ``tag``, and from the record."""
        raise NotImplementedError(f"{type(self).__name__} draws no {name!r}")

    def shows(self, name: str, tag: str) -> bool:
        """Whether there is something to draw: a history needs a fit."""
        return True

    def check_figure(self, name: str, trainer: pl.Trainer) -> None:
        """Refuse a figure, asked for by its name, that could never show anything in this run."""

    def entry(self, trainer: pl.Trainer) -> Entry:
        """Further numbers for the history."""
        return {}

    def collect(self, trainer: pl.Trainer, tag: str) -> None:
        """Take into the record what a figure shows of other callbacks; they have reported."""

    # ------------------------------------------------------------------ what a user reads

    @property
    def results(self) -> dict[str, float]:
        """The latest value of each log key."""
        return self.record.results

    @results.setter
    def results(self, values: dict[str, float]) -> None:
        self.record.results = values

    @property
    def history(self) -> dict[str, list[Entry]]:
        """By tag (``"val"``), the values after each validation of the fit."""
        return self.record.history

    def figure(self, name: str, tag: str = "val") -> Figure:
        """A figure of what was counted last, from state: in a fresh process, too.

        Args:
            name: one of the figures that the class lists.
            tag: ``"val"`` or ``"test"``; ``"val/dataloader_idx_1"`` with several dataloaders.

        Raises:
            ArgumentError: if nothing was counted under the tag, or there is no such figure.
        """
        self._check_figures([name])
        if tag not in self.record.states:
            known = ", ".join(sorted(self.record.states)) or "nothing"
            raise ArgumentError(
                self,
                f"has nothing to draw for {tag!r}; it has counted {known}",
                cure="trainer.validate(module, loader)",
            )
        return self._drawing(name, tag).figure

    @property
    def state_key(self) -> str:
        """The key in a checkpoint: one monitor of a kind for validation and one for test."""
        kind = type(self).__qualname__
        return kind if self.stages == STAGES else f"{kind}[{','.join(self.stages)}]"

    def state_dict(self) -> dict[str, Any]:
        """Values, history, and the states that figures are drawn from."""
        return self.record.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was saved."""
        self.record.load_state_dict(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse figures that cannot be drawn."""
        if self.figures and not have_matplotlib():
            raise RegularizationError(
                self, "`figures` needs matplotlib", cure='pip install "lightning_reg[demo]"'
            )
        if self.figures is None and self.usual_figures and not have_matplotlib():
            rank_zero_info(
                f"{type(self).__name__}: no figures without matplotlib "
                '(pip install "lightning_reg[demo]"); values are logged.'
            )
        for name in self.figures if isinstance(self.figures, Sequence) else ():
            self.check_figure(name, trainer)

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
        self._count(outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        self._report(trainer, pl_module, "val")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, once every monitor has its values, and stop to watch."""
        self._draw(trainer, "val")
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
        self._count(outputs, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        self._report(trainer, pl_module, "test")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw and stop to watch."""
        self._draw(trainer, "test")
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
        self._feed = StepFeed(self, trainer, module, _HOOKS[stage])
        self._finished = False
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
        if self._feed is not None:
            self._feed.start_batch()

    def _count(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        if self._feed is None:
            return
        step = self._feed.end_batch(outputs, batch, batch_idx)
        counted = counted_rows(step, self._loaders[dataloader_idx])
        self.observe(self._metrics[dataloader_idx], step, counted)

    def _report(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        # The sanity check's batches are fed too, so that a tensor that is not found is an error
        # before the first epoch; nothing of them is reported, and the next start makes new metrics.
        if self._feed is None or trainer.sanity_checking:
            return
        self._join(trainer, module)
        for index, metrics in self._metrics.items():
            tag = self._tag(stage, index)
            for metric in metrics.values():
                metric.warn_of_invalid()
            values = self.read(metrics)
            self.record.keep(tag, states_of(metrics), int(trainer.global_step))
            if not values:
                continue
            for name, value in values.items():
                key = self._key(stage, name) + tag[len(stage) :]
                self.results[key] = float(value)
                log_joint(module, key, value)
            if stage == "val" and fitting(trainer):
                position = {"epoch": trainer.current_epoch, "step": int(trainer.global_step)}
                own = {name: float(value) for name, value in values.items()}
                self.record.remember(tag, {**position, **own, **self.entry(trainer)})

    def _join(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Bring the states of all monitors together, when the first of them reports."""
        callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        counted: list[ExactMetric] = []
        for monitor in callbacks:
            if isinstance(monitor, Monitor) and monitor._feed is not None and not monitor._finished:
                monitor._finished = True
                counted += monitor.finish(trainer, module)
        join_states(counted)

    def _draw(self, trainer: pl.Trainer, stage: Stage) -> None:
        if self._feed is None or trainer.sanity_checking:
            return
        if fitting(trainer) and trainer.current_epoch % self.every_n_epochs:
            return
        for index in self._metrics:
            tag = self._tag(stage, index)
            self.collect(trainer, tag)
            for name in [n for n in self._wanted_figures() if self.shows(n, tag)]:
                write_figure(trainer, f"{tag}/{name}", partial(self._drawing, name, tag))

    def _drawing(self, name: str, tag: str) -> Drawing:
        metrics = self.build_metrics()
        with_states(metrics, self.record.states[tag])
        return self.drawing(name, tag, metrics)

    def _wanted_figures(self) -> Sequence[str]:
        if self.figures is None or isinstance(self.figures, bool):
            drawn = have_matplotlib() if self.figures is None else self.figures
            return self.usual_figures if drawn else ()
        return self.figures

    def _tag(self, stage: Stage, index: int) -> str:
        return f"{stage}/dataloader_idx_{index}" if len(self._metrics) > 1 else stage

    def _key(self, stage: Stage, name: str) -> str:
        return f"{stage}/{name}"

    def _check(self, stages: Sequence[str], figures: Any, every_n_epochs: int) -> None:
        unknown = [stage for stage in stages if stage not in STAGES]
        if unknown or isinstance(stages, str):
            raise ArgumentError(
                self,
                f"`stages` must be a list of {', '.join(STAGES)}, got {stages!r}",
                cure=f'{type(self).__name__}(stages=["val"])',
            )
        if not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            raise ArgumentError(
                self,
                f"`every_n_epochs` must be a whole number from 1, got {every_n_epochs!r}",
                cure=f"{type(self).__name__}(every_n_epochs=1)",
            )
        if figures is not None and not isinstance(figures, bool):
            self._check_figures(figures)

    def _check_figures(self, figures: Any) -> None:
        names = [figures] if isinstance(figures, str) else list(figures)
        unknown = [name for name in names if name not in self.figure_names]
        if unknown or isinstance(figures, str):
            raise ArgumentError(
                self,
                f"`figures` must be a list of {', '.join(self.figure_names)}, got {figures!r}",
                cure=f'{type(self).__name__}(figures=["{self.figure_names[0]}"])',
            )

    def _close(self) -> None:
        if self._feed is not None:
            self._feed.close()
        self._feed, self._loaders = None, []

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a run that is under way is not part of a copy.
        return {**self.__dict__, "_feed": None, "_loaders": []}


__all__ = ["STAGES", "Monitor", "Stage", "_Run"]
