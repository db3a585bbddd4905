"""Tracks how honest a classifier's confidence is while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.step import Step
from lightning_reg.metrics.binning import ReliabilityBins
from lightning_reg.metrics.calibration_suite import CalibrationSuite
from lightning_reg.metrics.entropy import PredictiveEntropy
from lightning_reg.metrics.exact import ExactMetric
from lightning_reg.metrics.inputs import Task
from lightning_reg.metrics.readings import Norm
from lightning_reg.metrics.selective import AURC, SelectiveMetric
from lightning_reg.metrics.smooth_calibration import SmoothCalibrationError
from lightning_reg.monitors.calibration_drawings import (
    band_of,
    classwise_drawing,
    drift_drawing,
    reliability_drawing,
    risk_coverage_drawing,
    smooth_drawing,
    strength_drawing,
    temperature_drawing,
)
from lightning_reg.monitors.figures import Drawing
from lightning_reg.monitors.monitor import STAGES, Monitor, Stage
from lightning_reg.monitors.post_hoc_calibration import PostHocCalibration
from lightning_reg.monitors.predictions import predictions_of
from lightning_reg.monitors.record import Entry, update_all

__all__ = ["CalibrationMonitor"]

_STRENGTH = "strength/"
_ERRORS: dict[Norm, str] = {"l1": "ece", "l2": "rmsce", "max": "mce"}
# Read from the suite that is counted anyway; those of classes need their number.
_FROM_SUITE = (
    "rmsce",
    "mce",
    "debiased_rmsce",
    "ace",
    "overconfidence",
    "underconfidence",
    "confidence_gap",
    "brier",
    "reliability",
    "resolution",
    "uncertainty",
    "classwise_ece",
    "classwise_rmsce",
    "classwise_mce",
)


class CalibrationMonitor(Monitor):
    """Logs calibration error, likelihood, entropy and accuracy of validation and test steps.

    ``val/ece``, ``val/nll``, ``val/entropy`` and ``val/accuracy`` (``test/...``) reach the
    loggers and ``trainer.callback_metrics``, where ``ModelCheckpoint`` and closed-loop strengths
    find them. Figures go to each logger that takes them; PNG and JSON files in ``figures/`` of the
    Trainer's ``log_dir`` where one takes none. With several dataloaders each has its own values,
    ``val/ece/dataloader_idx_1``.

    The logits and targets come from the user's own step, which is not edited: from the dict that
    it returns, else from the output of ``self(...)`` and the batch; ``signals`` says otherwise.

    Figures, by name:

    - ``"reliability"``: accuracy by bin of confidence, with 95 % intervals and counts;
    - ``"classwise"``: reliability of each class's probability; of the worst nine where there are
      more (needs ``num_classes``);
    - ``"smooth"``: the smooth reliability curve of smECE;
    - ``"risk_coverage"``: the risk of the most confident share;
    - ``"temperature"``: reliability raw and calibrated, of a ``PostHocCalibration`` among the
      Trainer's callbacks;
    - ``"drift"``: ECE and NLL over epochs;
    - ``"strength"``: each technique's strength over epochs, and ECE against it.

    Args:
        n_bins: the number of equal-width bins.
        norm: of the calibration error: ``"l1"``, ``"l2"`` or ``"max"``.
        task: ``"multiclass"``: logits (B, C, ...), or (B, ..., C) where only that fits the
            targets; ``"binary"``: logits (B, ...) or (B, ..., 1).
        from_logits: whether what the step's ``logits`` holds are scores before the softmax, or
            probabilities (``False``).
        ignore_index: positions with this class index do not count.
        num_classes: C, for values and figures of each class.
        metrics: further values to log: ``"confidence_gap"`` (mean confidence minus accuracy, with
            its sign), ``"overconfidence"`` and ``"underconfidence"`` (the parts of the ECE from
            bins that are too confident, and not enough), ``"smece"``, ``"aurc"``, ``"brier"`` with
            ``"reliability"``, ``"resolution"`` and ``"uncertainty"``, ``"ace"``, ``"rmsce"``,
            ``"debiased_rmsce"``, ``"mce"``, and with ``num_classes`` ``"classwise_ece"``,
            ``"classwise_rmsce"``, ``"classwise_mce"``.
        stages: ``"val"``, ``"test"`` or both.
        figures: their names; ``True`` for ``reliability`` and ``drift``, ``False`` for none,
            ``None`` for those two if matplotlib is installed.
        every_n_epochs: draw at each n-th epoch of a fit.
        signals: where the tensors are found, if not in the usual places.

    Attributes:
        results: the latest value of each log key.
        history: by tag (``"val"``), the values after each validation of the fit.
        reliability: the latest bins of all ranks, by tag.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: if figures are asked for and matplotlib, or the callback that one
            shows, is missing.
        MissingSignalError: in the first step (of the sanity check, too) without logits or targets.

    Note:
        Exact over ranks: the sums are joined, never the values averaged, and a sample that a
        DistributedSampler repeats to fill up the last batch counts once. Nothing of the sanity
        check is counted. Figures are drawn by rank 0 from what was counted, so that
        :meth:`figure` draws the same after a checkpoint was loaded.

        Costs two softmaxes in float64 a batch, one for the entropy and one for all else; ``smece``,
        ``aurc`` and their figures share a third and a histogram of 1 MB, which goes into
        checkpoints.

    Example:
        >>> from lightning_reg.monitors import CalibrationMonitor
        >>> monitor = CalibrationMonitor(n_bins=10, figures=False)
        >>> callbacks = [monitor]  # Trainer(callbacks=callbacks) then logs val/ece
    """

    figure_names: ClassVar[tuple[str, ...]] = (
        "reliability",
        "classwise",
        "smooth",
        "risk_coverage",
        "temperature",
        "drift",
        "strength",
    )
    usual_figures: ClassVar[tuple[str, ...]] = ("reliability", "drift")
    further: ClassVar[Mapping[str, type[ExactMetric]]] = {
        "smece": SmoothCalibrationError,
        "aurc": AURC,
    }
    _needed: ClassVar[Mapping[str, str]] = {"smooth": "smece", "risk_coverage": "aurc"}

    def __init__(
        self,
        *,
        n_bins: int = 15,
        norm: Norm = "l1",
        task: Task = "multiclass",
        from_logits: bool = True,
        ignore_index: int | None = None,
        num_classes: int | None = None,
        metrics: Sequence[str] = (),
        stages: Sequence[Stage] = STAGES,
        figures: bool | Sequence[str] | None = None,
        every_n_epochs: int = 1,
        signals: Signals | None = None,
    ) -> None:
        super().__init__(
            stages=stages, figures=figures, every_n_epochs=every_n_epochs, signals=signals
        )
        known = [*_FROM_SUITE, *self.further]
        if isinstance(metrics, str) or any(name not in known for name in metrics):
            raise ArgumentError(
                self,
                f"`metrics` must be a list of {', '.join(known)}, got {metrics!r}",
                cure='CalibrationMonitor(metrics=["overconfidence"])',
            )
        self.n_bins = n_bins
        self.norm: Norm = norm
        self.task: Task = task
        self.from_logits = from_logits
        self.ignore_index = ignore_index
        self.num_classes = num_classes
        self.metrics = tuple(metrics)
        by_class = [name for name in metrics if name.startswith("classwise")]
        self._check_classes([*by_class, *(figures if isinstance(figures, Sequence) else ())])
        self.build_metrics()  # refuses wrong arguments now

    @property
    def reliability(self) -> dict[str, ReliabilityBins]:
        """The latest bins of all ranks, by tag."""
        return {tag: _bins(states["suite"]) for tag, states in self.record.states.items()}

    def build_metrics(self) -> dict[str, ExactMetric]:
        """Those that are always logged, further ones, and those that figures are drawn from."""
        shared: dict[str, Any] = {
            "from_logits": self.from_logits,
            "task": self.task,
            "ignore_index": self.ignore_index,
        }
        figures = self.figures if isinstance(self.figures, Sequence) else ()
        wanted = {*self.metrics, *(self._needed[name] for name in figures if name in self._needed)}
        suite = CalibrationSuite(
            n_bins=self.n_bins, sweep=(), num_classes=self.num_classes, **shared
        )
        return {
            "suite": suite,
            "entropy": PredictiveEntropy(**shared),
            **{name: kind(**shared) for name, kind in self.further.items() if name in wanted},
        }

    def observe(
        self, metrics: Mapping[str, ExactMetric], step: Step, counted: Tensor | None
    ) -> None:
        """Update all metrics with the batch."""
        update_all(metrics.values(), *predictions_of(step, self.task, counted))

    def read(self, metrics: Mapping[str, ExactMetric]) -> dict[str, Tensor]:
        """The values."""
        suite = metrics["suite"].value()
        values = {
            "ece": suite[_ERRORS[self.norm]],
            "nll": suite["nll"],
            "entropy": metrics["entropy"].value(),
            "accuracy": suite["accuracy"],
        }
        values |= {name: metrics[name].value() for name in self.further if name in metrics}
        return values | {name: suite[name] for name in _FROM_SUITE if name in self.metrics}

    def entry(self, trainer: pl.Trainer) -> Entry:
        """The strengths with which the epoch was trained."""
        techniques = [c for c in trainer.callbacks if isinstance(c, Regularizer)]  # type: ignore[attr-defined]
        return {
            f"{_STRENGTH}{technique.name}": float(technique.pipeline.strength(technique))
            for technique in techniques
            if technique.pipeline is not None
        }

    # ------------------------------------------------------------------ figures

    def shows(self, name: str, tag: str) -> bool:
        """Histories are those of a fit."""
        return name not in ("drift", "strength") or bool(self.history.get(tag))

    def check_figure(self, name: str, trainer: pl.Trainer) -> None:
        """Refuse figures of callbacks that are not there."""
        if name == "temperature" and _calibrating(trainer) is None:
            raise ArgumentError(
                self,
                "draws predictions before and after calibration, and no callback calibrates",
                cure="Trainer(callbacks=[PostHocCalibration(), CalibrationMonitor(...)])",
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if name == "strength" and not any(isinstance(c, Regularizer) for c in callbacks):
            raise ArgumentError(
                self,
                "draws the strengths of techniques, and there is none among the callbacks",
                cure='CalibrationMonitor(figures=["reliability", "drift"])',
            )

    def collect(self, trainer: pl.Trainer, tag: str) -> None:
        """The bins before and after calibration."""
        other = _calibrating(trainer)
        if other is None or "temperature" not in self._wanted_figures():
            return
        counted = other.record.states.get(tag, {})
        kept = self.record.states[tag]
        for name, own in (("raw", "ece"), ("calibrated", f"ece_{other.suffix}")):
            kept.pop(name, None)
            if own in counted:
                kept[name] = counted[own]
        temperature = getattr(other.calibrator, "temperature", None)
        if isinstance(temperature, float):
            kept["temperature"] = {"value": torch.tensor(temperature, dtype=torch.float64)}

    def drawing(self, name: str, tag: str, metrics: Mapping[str, ExactMetric]) -> Drawing:
        """Draw one of the figures."""
        history, title = self.history.get(tag, []), self.record.title(tag)
        if name == "drift":
            return drift_drawing(history, {"ece": "ECE", "nll": "NLL"}, title)
        if name == "strength":
            return strength_drawing(history, _STRENGTH, title)
        if name == "smooth":
            smooth = cast("SmoothCalibrationError", metrics["smece"])
            return smooth_drawing(smooth.curve(), float(smooth.value()), title)
        if name == "risk_coverage":
            ranking = cast("SelectiveMetric", metrics["aurc"])
            return risk_coverage_drawing(*ranking.curve(), float(ranking.value()), title)
        suite = cast("CalibrationSuite", metrics["suite"])
        bins = suite.bins()
        if name == "classwise":
            self._check_classes([name])
            return classwise_drawing(suite.class_moments().bins, norm=self.norm, title=title)
        if name == "temperature":
            return self._temperature_drawing(tag, bins)
        return reliability_drawing(bins, norm=self.norm, band=band_of(bins), title=title)

    def _check_classes(self, names: Sequence[str]) -> None:
        by_class = [name for name in names if name.startswith("classwise")]
        if by_class and self.num_classes is None:
            raise ArgumentError(
                self,
                f"needs the number of classes for {by_class[0]!r}",
                cure="CalibrationMonitor(num_classes=10, ...)",
            )

    def _temperature_drawing(self, tag: str, bins: ReliabilityBins) -> Drawing:
        states = self.record.states[tag]
        found = states.get("temperature")
        return temperature_drawing(
            _bins(states["raw"]) if "raw" in states else bins,
            _bins(states["calibrated"]) if "calibrated" in states else None,
            norm=self.norm,
            temperature=None if found is None else float(found["value"]),
            title=self.record.title(tag),
        )


def _calibrating(trainer: pl.Trainer) -> Any:
    """The callback that fits a calibrator, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, PostHocCalibration)), None)


def _bins(states: Mapping[str, Tensor]) -> ReliabilityBins:
    return ReliabilityBins(*(states[name] for name in ReliabilityBins._fields))
