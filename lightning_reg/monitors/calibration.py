"""Tracks how honest a classifier's confidence is while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, RegularizationError
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.step import Step
from lightning_reg.metrics.calibration import CalibrationError, Norm, ReliabilityBins
from lightning_reg.metrics.entropy import PredictiveEntropy
from lightning_reg.metrics.exact import ExactMetric
from lightning_reg.metrics.inputs import Task
from lightning_reg.metrics.likelihood import ExpectedAccuracy, NegativeLogLikelihood
from lightning_reg.metrics.reliability import draw_reliability
from lightning_reg.monitors.figures import have_matplotlib, write_figure
from lightning_reg.monitors.monitor import STAGES, Monitor, Stage

__all__ = ["CalibrationMonitor"]


class CalibrationMonitor(Monitor):
    """Logs calibration error, likelihood, entropy and accuracy of validation and test steps.

    ``val/ece``, ``val/nll``, ``val/entropy`` and ``val/accuracy`` (``test/...``) reach the
    loggers and ``trainer.callback_metrics``, where ``ModelCheckpoint`` and closed-loop strengths
    find them. A reliability diagram goes to each logger that takes figures; without one, PNG and
    JSON files go to ``figures/`` in the Trainer's ``log_dir``. With several dataloaders each
    has its own values, ``val/ece/dataloader_idx_1``.

    The logits and targets come from the user's own step, which is not edited: from the dict that
    it returns, else from the output of ``self(...)`` and the batch; ``signals`` says otherwise.

    Args:
        n_bins: the number of equal-width bins.
        norm: of the calibration error: ``"l1"``, ``"l2"`` or ``"max"``.
        task: ``"multiclass"``: logits (B, C, ...), or (B, ..., C) where only that fits the
            targets; ``"binary"``: logits (B, ...) or (B, ..., 1).
        from_logits: whether what the step's ``logits`` holds are scores before the softmax, or
            probabilities (``False``).
        ignore_index: positions with this class index do not count.
        stages: ``"val"``, ``"test"`` or both.
        figures: draw reliability diagrams; ``None`` draws them if matplotlib is installed.
        every_n_epochs: draw at each n-th validation epoch.
        signals: where the tensors are found, if not in the usual places.

    Attributes:
        results: the latest value of each log key.
        reliability: the latest bins of all ranks, by stage (``"val"``).

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: if figures are asked for and matplotlib is missing.
        MissingSignalError: in the first step (of the sanity check, too) without logits or targets.

    Note:
        Exact over ranks: the sums are joined, never the values averaged, and a sample that a
        DistributedSampler repeats to fill up the last batch counts once. Nothing of the sanity
        check is counted. Costs one log-softmax in float64 a batch and metric (three).

    Example:
        >>> from lightning_reg.monitors import CalibrationMonitor
        >>> monitor = CalibrationMonitor(n_bins=10, figures=False)
        >>> callbacks = [monitor]  # Trainer(callbacks=callbacks) then logs val/ece
    """

    def __init__(
        self,
        *,
        n_bins: int = 15,
        norm: Norm = "l1",
        task: Task = "multiclass",
        from_logits: bool = True,
        ignore_index: int | None = None,
        stages: Sequence[Stage] = STAGES,
        figures: bool | None = None,
        every_n_epochs: int = 1,
        signals: Signals | None = None,
    ) -> None:
        super().__init__(stages=stages, signals=signals)
        if not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            raise ArgumentError(
                self,
                f"`every_n_epochs` must be a whole number from 1, got {every_n_epochs!r}",
                cure="CalibrationMonitor(every_n_epochs=1)",
            )
        self.n_bins = n_bins
        self.norm = norm
        self.task = task
        self.from_logits = from_logits
        self.ignore_index = ignore_index
        self.figures = figures
        self.every_n_epochs = every_n_epochs
        self.reliability: dict[str, ReliabilityBins] = {}
        self._bins: ReliabilityBins | None = None
        self.build_metrics()  # refuses wrong arguments now

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse figures that cannot be drawn."""
        if self.figures and not have_matplotlib():
            raise RegularizationError(
                self, "figures=True needs matplotlib", cure='pip install "lightning_reg[demo]"'
            )
        if self.figures is None and not have_matplotlib():
            rank_zero_info(
                "CalibrationMonitor: no reliability diagrams without matplotlib "
                '(pip install "lightning_reg[demo]"); values are logged.'
            )

    def build_metrics(self) -> dict[str, ExactMetric]:
        """Calibration error, likelihood, entropy and accuracy."""
        shared: dict[str, Any] = {
            "from_logits": self.from_logits,
            "task": self.task,
            "ignore_index": self.ignore_index,
        }
        return {
            "ece": CalibrationError(n_bins=self.n_bins, norm=self.norm, **shared),
            "nll": NegativeLogLikelihood(**shared),
            "entropy": PredictiveEntropy(**shared),
            "accuracy": ExpectedAccuracy(**shared),
        }

    def observe(
        self, metrics: Mapping[str, ExactMetric], step: Step, counted: Tensor | None
    ) -> None:
        """Update all metrics with the batch."""
        logits, targets = step.logits, torch.as_tensor(step.targets)
        if self.task == "binary" and logits.ndim == targets.ndim + 1 and logits.shape[-1] == 1:
            logits = logits.squeeze(-1)
        if self.task == "multiclass" and _classes_last(logits, targets):
            logits = logits.movedim(-1, 1)
        if counted is not None:
            logits, targets = logits[counted], targets[counted]
        for metric in metrics.values():
            metric.update(logits, targets)

    def read(self, metrics: Mapping[str, ExactMetric]) -> dict[str, Tensor]:
        """The values; the bins are kept for the diagram."""
        error = cast("CalibrationError", metrics["ece"])
        self._bins = ReliabilityBins(*(state.detach().cpu().clone() for state in error.bins()))
        return {name: metric.value() for name, metric in metrics.items()}

    def draw(self, trainer: pl.Trainer, tag: str) -> None:
        """The reliability diagram of the values that were just logged."""
        bins = self._bins
        assert bins is not None
        self.reliability[tag] = bins
        wanted = have_matplotlib() if self.figures is None else self.figures
        if not wanted or (trainer.training and trainer.current_epoch % self.every_n_epochs):
            return
        title = f"{tag}, step {int(trainer.global_step)}"
        write_figure(
            trainer,
            f"{tag}/reliability",
            lambda: draw_reliability(bins, norm=self.norm, title=title)[0],
            {name: values.tolist() for name, values in bins._asdict().items()},
        )


def _classes_last(logits: Tensor, targets: Tensor) -> bool:
    """Whether the shapes only fit with the classes on the last dimension (token logits)."""
    first = logits.shape[:1] + logits.shape[2:]
    return targets.shape == logits.shape[:-1] and targets.shape != first
