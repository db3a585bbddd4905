"""Fits a calibrator on held-out data while a Trainer runs, and applies it in prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_reg.calibrators.calibrator import Calibrator
from lightning_reg.calibrators.temperature import TemperatureScaling
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError, RegularizationError, UnsupportedError
from lightning_reg.engine.observe import held_out_steps, validation_loaders
from lightning_reg.engine.signals import SignalReader, Signals
from lightning_reg.engine.step import Step
from lightning_reg.metrics.calibration import CalibrationError
from lightning_reg.metrics.entropy import PredictiveEntropy
from lightning_reg.metrics.exact import ExactMetric
from lightning_reg.metrics.likelihood import ExpectedAccuracy, NegativeLogLikelihood
from lightning_reg.monitors.calibrated_predictions import CalibratedPredictions
from lightning_reg.monitors.held_out import Rows, join, rows_of
from lightning_reg.monitors.monitor import Monitor

__all__ = ["PostHocCalibration"]

FitOn = Literal["validation", "fit_end"]
_FIT_ON = ("validation", "fit_end")


class PostHocCalibration(Monitor):
    """Fits a calibrator on held-out data, logs what it gains, and applies it in ``predict``.

    Raw and calibrated values stand side by side: ``val/nll`` and ``val/nll_calibrated``, and so for
    ``ece``, ``entropy`` and ``accuracy``, in validation and test. Those of ``val`` are measured on
    the data of the fit, those of ``test`` on data that it has not seen. The weights and the
    module's own logs never change.

    In ``trainer.predict`` the logits that the module's ``forward`` returns (or the place that
    ``signals`` names) come out calibrated, so that your ``predict_step`` computes with them. The
    calibrator is saved with every checkpoint, next to the weights that it belongs to, and is
    fitted again in every validation, ``trainer.validate`` included.

    Args:
        calibrator: what is fitted; by default a :class:`TemperatureScaling`. It says the task, the
            label that does not count, and the dimension of the classes.
        fit_on: ``"validation"``: at the end of each validation, before checkpoints are written;
            ``"fit_end"``: once, when training has ended, for calibrators that take long. Its values
            then are ``fit/nll`` and ``fit/nll_calibrated``, in ``results`` and the loggers.
        dataloader: other held-out data to fit on: they go through ``self(inputs)``. Without,
            those of validation.
        dataloader_idx: which of several validation dataloaders is fitted on.
        n_bins: of the calibration error.
        apply_in_predict: whether predictions come out calibrated.
        suffix: ends the names of calibrated values; two callbacks need two suffixes.
        signals: where ``logits`` and ``targets`` (and, with a dataloader, ``inputs``) are.

    Attributes:
        calibrator: as it was fitted last.
        results: the latest value of each log key.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in ``predict``, if the calibrator was never fitted, or a checkpoint
            holds another kind.
        MissingSignalError: in the first step without logits or targets; in ``predict``, if no
            logits were seen.

    Note:
        Over ranks: the calibrator is that of one process with all samples, the same on every rank;
        what a DistributedSampler repeats does not count. A temperature takes a few integers from
        each rank per Newton step, others gather the logits once, to every rank. A ``dataloader``
        without a DistributedSampler is run by every rank, which keeps its share of the batches.
        Memory: the logits and labels of one rank's validation set, on the module's device, until
        the end of the validation; gathered ones for the set as a whole, in float64. Nothing of
        the sanity check is counted.

    Example:
        >>> from lightning_reg import PostHocCalibration, TemperatureScaling
        >>> callback = PostHocCalibration(TemperatureScaling())
        >>> callbacks = [callback]  # Trainer(callbacks=callbacks) then logs val/nll_calibrated
    """

    def __init__(
        self,
        calibrator: Calibrator | None = None,
        *,
        fit_on: FitOn = "validation",
        dataloader: Any = None,
        dataloader_idx: int = 0,
        n_bins: int = 15,
        apply_in_predict: bool = True,
        suffix: str = "calibrated",
        signals: Signals | None = None,
    ) -> None:
        super().__init__(figures=False, signals=signals)
        self._check_arguments(calibrator, fit_on, dataloader_idx, suffix)
        self.calibrator = TemperatureScaling() if calibrator is None else calibrator
        self.fit_on = fit_on
        self.dataloader = dataloader
        self.dataloader_idx = dataloader_idx
        self.n_bins = n_bins
        self.apply_in_predict = apply_in_predict
        self.suffix = suffix
        self._kept: dict[int, list[Rows]] = {}
        self._keeps = False
        self._applied: CalibratedPredictions | None = None
        self._metric_set()  # refuses wrong arguments now

    @property
    def state_key(self) -> str:
        """The key in a checkpoint."""
        name = type(self).__qualname__
        return name if self.suffix == "calibrated" else f"{name}[{self.suffix}]"

    # ------------------------------------------------------------------ metrics

    def build_metrics(self) -> dict[str, ExactMetric]:
        """Raw values, and calibrated ones where a calibrator is there in time."""
        metrics = self._metric_set()
        if self._keeps or self.calibrator.fitted:
            metrics |= {f"{k}_{self.suffix}": m for k, m in self._metric_set().items()}
        return metrics

    def observe(
        self, metrics: Mapping[str, ExactMetric], step: Step, counted: Tensor | None
    ) -> None:
        """Update raw values; keep the rows for the fit, or update the calibrated ones."""
        rows = rows_of(self, self.calibrator, step, counted)
        self._update(metrics, rows.logits, rows.targets, calibrated=False)
        if self._keeps:
            index = next(i for i, own in self._metrics.items() if own is metrics)
            self._kept.setdefault(index, []).append(rows.copy())
        elif self.calibrator.fitted:
            self._update_calibrated(metrics, rows)

    def read(self, metrics: Mapping[str, ExactMetric]) -> dict[str, Tensor]:
        """The values."""
        return {name: metric.value() for name, metric in metrics.items()}

    # ------------------------------------------------------------------ fit

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit on a dataloader of its own, or prepare to keep what validation shows."""
        fits = self.fit_on == "validation" and not trainer.sanity_checking
        self._keeps = fits and self.dataloader is None
        if fits and self.dataloader is not None:
            self._fit(trainer, self._pass(trainer, pl_module, self.dataloader))
        super().on_validation_start(trainer, pl_module)

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[ExactMetric]:
        """Fit, and count what the fitted calibrator makes of the validation set."""
        if self._keeps:
            if self.dataloader_idx >= len(self._metrics):
                raise self._no_such_loader(len(self._metrics))
            self._fit(trainer, self._kept.get(self.dataloader_idx, []))
            for index, metrics in self._metrics.items():
                for rows in self._kept.get(index, []):
                    self._update_calibrated(metrics, rows)
        self._kept = {}
        return super().finish(trainer, module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to watch."""
        self._keeps = False
        super().on_test_start(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit on the trained model, if that is when."""
        if self.fit_on != "fit_end":
            return
        loader = self.dataloader
        if loader is None:
            loaders = validation_loaders(trainer)
            if self.dataloader_idx >= len(loaders):
                raise self._no_such_loader(len(loaders))
            loader = loaders[self.dataloader_idx]
        kept = self._pass(trainer, pl_module, loader)
        self._fit(trainer, kept)
        self._log_fit(trainer, pl_module, kept)

    def _fit(self, trainer: pl.Trainer, kept: list[Rows]) -> None:
        comm = Communicator.of(trainer)
        rows = join(kept, comm, trainer.strategy.root_device)
        self.calibrator.fit(rows.logits, rows.targets, comm=comm, **rows.arguments)

    def _pass(self, trainer: pl.Trainer, module: pl.LightningModule, loader: Any) -> list[Rows]:
        """The rows of this rank's share of a dataloader."""
        steps = held_out_steps(self, trainer, module, loader)  # type: ignore[arg-type]
        return [rows_of(self, self.calibrator, *found).copy() for found in steps]

    def _log_fit(self, trainer: pl.Trainer, module: pl.LightningModule, kept: list[Rows]) -> None:
        metrics = {name: m.to(module.device) for name, m in self.build_metrics().items()}
        for rows in kept:
            self._update(metrics, rows.logits, rows.targets, calibrated=False)
            self._update_calibrated(metrics, rows)
        values = {f"fit/{name}": float(metric.compute()) for name, metric in metrics.items()}
        self.results |= values
        for logger in trainer.loggers:
            logger.log_metrics(values, step=int(trainer.global_step))

    # ------------------------------------------------------------------ predict

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stand between the module's logits and whatever ``predict_step`` does with them."""
        if not self.apply_in_predict:
            return
        if not self.calibrator.fitted:
            raise RegularizationError(
                self,
                "has no fitted calibrator to apply to predictions",
                cure='trainer.predict(module, loader, ckpt_path="last.ckpt"), or '
                "PostHocCalibration(apply_in_predict=False)",
            )
        source = SignalReader(self, pl_module).source("logits")  # type: ignore[arg-type]
        if getattr(self.calibrator, "transforms", ()) and source not in (None, "forward"):
            raise UnsupportedError(
                self,
                "transforms the model's inputs, which it can do in predict only where logits are "
                f"what `forward` returns; `signals` says {source!r}",
                cure="PostHocCalibration(apply_in_predict=False)",
            )
        self._applied = CalibratedPredictions(self.calibrator, trainer, pl_module, source)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Calibrate logits that came out of no call, but are in the dict that the step returns."""
        if self._applied is not None:
            self._applied.finish(self, outputs)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module as it was."""
        self._close()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The calibrator, and the values."""
        return {
            "record": super().state_dict(),
            "kind": type(self.calibrator).__name__,
            "calibrator": dict(self.calibrator.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a calibrator of the same kind."""
        kind = type(self.calibrator).__name__
        if state_dict["kind"] != kind:
            raise RegularizationError(
                self,
                f"the checkpoint holds a {state_dict['kind']}, this callback a {kind}",
                cure=f"PostHocCalibration({state_dict['kind']}())",
            )
        super().load_state_dict(state_dict["record"])
        self.calibrator.load_state_dict(state_dict["calibrator"])

    # ------------------------------------------------------------------ internals

    def _metric_set(self) -> dict[str, ExactMetric]:
        shared: dict[str, Any] = {
            "from_logits": True,
            "task": self.calibrator.task,
            "ignore_index": self.calibrator.ignore_index,
        }
        return {
            "nll": NegativeLogLikelihood(**shared),
            "ece": CalibrationError(n_bins=self.n_bins, **shared),
            "entropy": PredictiveEntropy(**shared),
            "accuracy": ExpectedAccuracy(**shared),
        }

    def _update_calibrated(self, metrics: Mapping[str, ExactMetric], rows: Rows) -> None:
        logits = self.calibrator.calibrate(rows.logits, **rows.arguments)
        self._update(metrics, logits, rows.targets, calibrated=True)

    def _update(
        self,
        metrics: Mapping[str, ExactMetric],
        logits: Tensor,
        targets: Tensor,
        *,
        calibrated: bool,
    ) -> None:
        for name, metric in metrics.items():
            if name.endswith(f"_{self.suffix}") == calibrated:
                metric.update(logits, targets)

    def _no_such_loader(self, count: int) -> ArgumentError:
        return ArgumentError(
            self,
            f"`dataloader_idx` is {self.dataloader_idx}, and there are {count} validation "
            "dataloaders",
            cure="PostHocCalibration(dataloader=calibration_loader)",
        )

    def _check_arguments(
        self, calibrator: object, fit_on: str, dataloader_idx: object, suffix: object
    ) -> None:
        if calibrator is not None and not isinstance(calibrator, Calibrator):
            raise ArgumentError(
                self,
                f"`calibrator` must be a calibrator, got {calibrator!r}",
                cure="PostHocCalibration(TemperatureScaling())",
            )
        if fit_on not in _FIT_ON:
            raise ArgumentError(
                self,
                f"`fit_on` must be one of {', '.join(_FIT_ON)}, got {fit_on!r}",
                cure='PostHocCalibration(fit_on="validation")',
            )
        if not isinstance(dataloader_idx, int) or dataloader_idx < 0:
            raise ArgumentError(
                self,
                f"`dataloader_idx` must be a whole number from 0, got {dataloader_idx!r}",
                cure="PostHocCalibration(dataloader_idx=0)",
            )
        if not isinstance(suffix, str) or not suffix:
            raise ArgumentError(
                self,
                f"`suffix` must be a word, got {suffix!r}",
                cure='PostHocCalibration(suffix="calibrated")',
            )

    def _close(self) -> None:
        super()._close()
        self._kept = {}
        if self._applied is not None:
            self._applied.detach()
            self._applied = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": {}, "_applied": None}
