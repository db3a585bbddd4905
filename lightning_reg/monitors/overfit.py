"""Tracks how far a model's answers on training data and on held-out data part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.criterion import as_distribution, mixed
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.observe import StepWatcher
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.stages import fitting
from lightning_reg.engine.step import Step
from lightning_reg.metrics.calibration_suite import CalibrationSuite
from lightning_reg.metrics.entropy import PredictiveEntropy
from lightning_reg.metrics.exact import ExactMetric
from lightning_reg.metrics.inputs import Task
from lightning_reg.metrics.margin import ProbabilityMargin
from lightning_reg.monitors.drawings import Curve, curves_drawing
from lightning_reg.monitors.feed import StepFeed
from lightning_reg.monitors.figures import Drawing
from lightning_reg.monitors.monitor import Monitor, Stage
from lightning_reg.monitors.predictions import counted_rows, predictions_of
from lightning_reg.monitors.record import Entry, joined, states_of, update_all, with_states
from lightning_reg.monitors.train_subset import TrainSubset

__all__ = ["OverfitMonitor"]

_VALUES = {
    "loss": "cross-entropy",
    "accuracy": "accuracy",
    "ece": "ECE",
    "entropy": "entropy",
    "margin": "margin",
}


class OverfitMonitor(Monitor, StepWatcher):
    """Logs the gaps between validation and training: loss, accuracy, ECE, entropy and margin.

    ``gap/loss`` is the value on validation data less that on training data, and so are
    ``gap/accuracy``, ``gap/ece``, ``gap/entropy`` and ``gap/margin``: an overfitted classifier has
    a positive gap of loss and a negative one of accuracy and margin. All are computed from logits
    and targets, the loss as their cross-entropy: penalties, class weights and label smoothing of
    the loss that is trained are no part of a gap. ``ModelCheckpoint`` and closed-loop strengths
    find the gaps in ``trainer.callback_metrics``.

    The training side is by default what the training steps since the last validation gave, which
    costs no second pass. It is then an average over changing weights, with dropout, augmentation
    and mixed labels on. ``train_data`` measures it instead on a fixed part of the training data at
    validation time, with the weights and in the mode in which the validation data were seen.

    The figure ``"curves"`` shows both sides over epochs.

    Args:
        n_bins: the number of equal-width bins of the calibration error.
        task: ``"multiclass"`` or ``"binary"``; see :class:`CalibrationMonitor`.
        from_logits: whether what the steps' ``logits`` hold are scores before the softmax, or
            probabilities (``False``).
        ignore_index: positions with this class index do not count.
        train_data: ``None``: measured in the training steps; a number: of samples from the training
            dataloader's dataset, always the same ones, that go through ``validation_step``; or a
            map-style dataset of training samples, for example one without augmentation.
        figures: ``["curves"]``; ``True`` for it, ``False`` for none, ``None`` for it if matplotlib
            is installed.
        every_n_epochs: draw at each n-th epoch of a fit.
        signals: where the tensors are found, if not in the usual places; the same for both sides.

    Attributes:
        results: the latest gap of each log key.
        history: by tag (``"val"``), gaps and both sides (``train_loss``, ``val_loss``, ...) after
            each validation of the fit.

    Raises:
        ArgumentError: if an argument is outside its range.
        MissingSignalError: in the first step without logits or targets.

    Note:
        Exact over ranks: counts and sums are joined, never gaps averaged; samples that a
        DistributedSampler repeats count once. Nothing of the sanity check is counted, and a
        validation outside a fit logs nothing: there is no training side. With several validation
        dataloaders each has its gap to the one training side. Inside an epoch a checkpoint holds
        what was counted on all ranks, and a resume goes on from there.

        Costs three softmaxes in float64 for a batch, in training too; with ``train_data`` none
        in training, and a forward pass over the part per validation.

    Example:
        >>> from lightning_reg.monitors import OverfitMonitor
        >>> monitor = OverfitMonitor(train_data=1000, figures=False)
        >>> callbacks = [monitor]  # Trainer(callbacks=callbacks) then logs gap/loss
    """

    name = "overfit_monitor"
    figure_names: ClassVar[tuple[str, ...]] = ("curves",)
    usual_figures: ClassVar[tuple[str, ...]] = ("curves",)

    def __init__(
        self,
        *,
        n_bins: int = 15,
        task: Task = "multiclass",
        from_logits: bool = True,
        ignore_index: int | None = None,
        train_data: Any = None,
        figures: bool | Sequence[str] | None = None,
        every_n_epochs: int = 1,
        signals: Signals | None = None,
    ) -> None:
        super().__init__(
            stages=["val"], figures=figures, every_n_epochs=every_n_epochs, signals=signals
        )
        if isinstance(train_data, int) and (train_data < 1 or isinstance(train_data, bool)):
            raise ArgumentError(
                self,
                f"`train_data` must be a number of samples from 1, got {train_data!r}",
                cure="OverfitMonitor(train_data=1000)",
            )
        self.n_bins = n_bins
        self.task: Task = task
        self.from_logits = from_logits
        self.ignore_index = ignore_index
        self.train_data = train_data
        self._train: dict[str, ExactMetric] = self.build_metrics()
        self._training: StepFeed | None = None
        self._sides: Entry = {}

    def build_metrics(self) -> dict[str, ExactMetric]:
        """Those of one side."""
        shared: dict[str, Any] = {
            "from_logits": self.from_logits,
            "task": self.task,
            "ignore_index": self.ignore_index,
        }
        return {
            "suite": CalibrationSuite(n_bins=self.n_bins, sweep=(), **shared),
            "entropy": PredictiveEntropy(**shared),
            "margin": ProbabilityMargin(**shared),
        }

    def observe(
        self, metrics: Mapping[str, ExactMetric], step: Step, counted: Tensor | None
    ) -> None:
        """Count a batch of one side."""
        predictions, targets = predictions_of(step, self.task, None)
        if step.mixes and not targets.is_floating_point() and predictions.ndim == 2:
            targets = mixed(step, as_distribution(targets, predictions))
        if counted is not None:
            counted = counted.to(predictions.device)
            predictions, targets = predictions[counted], targets[counted]
        update_all(metrics.values(), predictions, targets)

    def read(self, metrics: Mapping[str, ExactMetric]) -> dict[str, Tensor]:
        """The gaps; nothing without a training side."""
        self._sides = {}
        train = _values_of(self._train)
        if bool(torch.isnan(train["accuracy"])):
            return {}
        held_out = _values_of(metrics)
        for side, values in (("train", train), ("val", held_out)):
            self._sides |= {f"{side}_{name}": float(value) for name, value in values.items()}
        return {name: held_out[name] - train[name].to(held_out[name]) for name in held_out}

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[ExactMetric]:
        """Measure the training side, if that is when."""
        if self.train_data is not None and fitting(trainer):
            for step, counted in TrainSubset(self, self.train_data).steps(trainer, module):
                self.observe(self._train, step, counted)
        return [*super().finish(trainer, module), *self._train.values()]

    def entry(self, trainer: pl.Trainer) -> Entry:
        """Both sides."""
        return dict(self._sides)

    # ------------------------------------------------------------------ the training side

    def watch(self, step: Step) -> None:
        """Count a training step that the techniques' pipeline shows."""
        if self.train_data is None:
            self._watched(step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing of an earlier fit that stopped inside an epoch counts."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            for metric in self._train.values():
                metric.reset()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch training steps, where no pipeline shows them."""
        for metric in self._train.values():
            metric.to(pl_module.device)
        piped = any(isinstance(c, Regularizer) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if self.train_data is None and not piped:
            self._training = StepFeed(self, trainer, pl_module, "training_step")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record what the step calls."""
        if self._training is not None:
            self._training.start_batch()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the step."""
        if self._training is not None:
            self._watched(self._training.end_batch(outputs, batch, batch_idx))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop to watch."""
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop to watch."""
        super().on_exception(trainer, pl_module, exception)
        self._stop()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log; start the next interval."""
        if trainer.sanity_checking:
            return
        super().on_validation_epoch_end(trainer, pl_module)
        for metric in self._train.values():
            metric.reset()

    def _watched(self, step: Step) -> None:
        self.observe(self._train, step, counted_rows(step, step.trainer.train_dataloader))

    def _stop(self) -> None:
        if self._training is not None:
            self._training.close()
        self._training = None

    # ------------------------------------------------------------------ state

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """What all ranks have counted since the last validation."""
        with joined(self._train):
            checkpoint["callbacks"][self.state_key]["train"] = states_of(self._train)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from there; one rank has it, or it would count several times."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("train")
        if saved is not None and trainer.is_global_zero:
            with_states(self._train, saved)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_training": None}

    # ------------------------------------------------------------------ logs and figures

    def _key(self, stage: Stage, name: str) -> str:
        return f"gap/{name}"

    def shows(self, name: str, tag: str) -> bool:
        """Curves need a fit."""
        return bool(self.history.get(tag))

    def drawing(self, name: str, tag: str, metrics: Mapping[str, ExactMetric]) -> Drawing:
        """Both sides over epochs."""
        panels = {}
        for value, label in _VALUES.items():
            epochs, train = self.record.curve(tag, f"train_{value}")
            _, held_out = self.record.curve(tag, f"val_{value}")
            _, gaps = self.record.curve(tag, value)
            gap = f", gap {gaps[-1]:+.4f}" if gaps else ""
            panels[f"{label}{gap}"] = [
                Curve("training", epochs, train),
                Curve("validation", epochs, held_out),
            ]
        return curves_drawing(panels, x_label="epoch", title=self.record.title(tag), columns=3)


def _values_of(metrics: Mapping[str, ExactMetric]) -> dict[str, Tensor]:
    suite = metrics["suite"].value()
    return {
        "loss": suite["nll"],
        "accuracy": suite["accuracy"],
        "ece": suite["ece"],
        "entropy": metrics["entropy"].value(),
        "margin": metrics["margin"].value(),
    }
