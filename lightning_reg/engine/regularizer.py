"""The base of every technique: what it declares, and the phases it may override."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_reg.engine.closed_loop import ClosedLoop
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.technique import Technique

if TYPE_CHECKING:
    from lightning_reg.engine.communicator import JointMean
    from lightning_reg.engine.pipeline import TrainingStepPipeline
    from lightning_reg.engine.step import Step
    from lightning_reg.engine.update import ParameterUpdate

PHASES = (
    "prepare",
    "transform_batch",
    "forward_context",
    "transform_targets",
    "per_sample_loss",
    "sample_weights",
    "scale_loss",
    "penalty",
    "perturb",
    "parameter_gradient",
    "edit_gradients",
    "project",
)
CRITERION_PHASES = ("transform_targets", "per_sample_loss", "sample_weights")
WEIGHT_PHASES = ("perturb", "parameter_gradient", "edit_gradients", "project", "on_model_ready")

_SCHEDULES = "lightning_reg.schedules"


class Regularizer(Technique, Callback):
    """A technique as a Lightning callback; subclasses override the phases that they need.

    Args:
        strength: the multiplier of a penalty: a number, or a :class:`Schedule` over the run.
        signals: where the technique finds its tensors, if not in the usual places.
        name: the name in logs (``reg/<name>``), checkpoints and messages; needed only when one
            class is used twice in a Trainer.

    Raises:
        ArgumentError: if ``strength`` is neither a finite number nor a Schedule.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset()
    exclusive: ClassVar[frozenset[str]] = frozenset()
    # `parameter_gradient` reads nothing but weights, and takes its part of them from
    # `update.share`: it may run in front of the last backward of an optimizer step.
    splits: ClassVar[bool] = False
    explanation: ClassVar[str] = ""

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self._check_strength(strength)
        self.strength = strength
        self.signals = signals
        self.name = name or snake_case(type(self).__name__)
        self._pipeline: TrainingStepPipeline | None = None

    # ------------------------------------------------------------------ phases

    def active(self, context: Step | ParameterUpdate) -> bool:
        """Whether the technique acts now; an inactive one costs nothing."""
        return context.strength(self) != 0

    def acts_in(self, phase: str) -> bool:
        """Whether this instance uses a phase that its class implements; fixed once it is made."""
        return True

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a run in which the technique cannot be right."""

    def on_model_ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change the module after ``configure_model``, before optimizers and DDP exist."""

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take references from the weights that training starts with."""

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Undo every change to the module; called once, after an exception too."""

    def prepare(self, step: Step) -> None:
        """Before phase 1, and before it is asked which techniques are active: set attributes."""

    def transform_batch(self, step: Step) -> None:
        """Phase 1: edit ``step.inputs`` and mix targets."""

    def forward_context(self, step: Step) -> AbstractContextManager[Any]:
        """Phase 2: a context around the user's training step."""
        return nullcontext()

    def transform_targets(self, step: Step, distribution: Tensor) -> Tensor:
        """Phase 3: a new target distribution (B, C)."""
        return distribution

    def per_sample_loss(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """Phase 3: the loss of each sample (B,), in place of the cross-entropy."""
        raise NotImplementedError(f"{type(self).__name__} declares no loss")

    def sample_weights(self, step: Step, losses: Tensor) -> Tensor:
        """Phase 3: weights (B,) of mean one over all ranks, from detached losses (B,)."""
        raise NotImplementedError(f"{type(self).__name__} declares no weights")

    def scale_loss(self, step: Step) -> Tensor | float:
        """Phase 3: a factor of the loss, the same on all ranks; penalties are added after it."""
        return 1.0

    def penalty(self, step: Step) -> Tensor | JointMean | None:
        """Phase 4: a scalar that is added to the loss times the strength.

        A :class:`JointMean` is the mean over the samples of all ranks, which shares one
        collective with those of all other techniques.
        """
        return None

    def perturb(self, step: Step, total: Tensor) -> Tensor:
        """Phase 5: run phases 2 to 4 again elsewhere in weight space; returns the new loss."""
        return total

    def parameter_gradient(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 6: add a closed-form gradient, once per optimizer step; returns the value."""
        return None

    def edit_gradients(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 7: change gradients in place; returns a value for the log."""
        return None

    def project(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 8: change weights after an optimizer step; returns a value for the log."""
        return None

    # ------------------------------------------------------------------ hooks of the engine

    @property
    def state_key(self) -> str:
        """The key of this technique in a checkpoint."""
        kind = type(self).__qualname__
        return kind if self.name == snake_case(kind) else f"{kind}[{self.name}]"

    @property
    def pipeline(self) -> TrainingStepPipeline | None:
        """The pipeline that runs this technique, while a fit is under way."""
        return self._pipeline

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the module's pipeline; the first technique makes it."""
        if stage == "fit" and self._pipeline is None:
            from lightning_reg.engine.pipeline import TrainingStepPipeline

            TrainingStepPipeline.attach(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the module back."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Put the module back: Lightning does not call ``teardown`` after an exception."""
        self._close()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the pipeline."""
        for _, loop in self._loops():
            loop.on_train_start(trainer)
        if (pipeline := self._led()) is not None:
            pipeline.on_train_start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the pipeline which batch comes."""
        if (pipeline := self._led()) is not None:
            pipeline.on_train_batch_start(batch_idx)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the pipeline undo perturbations."""
        if (pipeline := self._led()) is not None:
            pipeline.on_after_backward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Phases 6 and 7, for all techniques in the planned order."""
        if (pipeline := self._led()) is not None:
            pipeline.on_before_optimizer_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Phase 8 and the log, for all techniques in the planned order."""
        if (pipeline := self._led()) is not None:
            pipeline.on_train_batch_end()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let closed loops follow their metrics."""
        for _, loop in self._loops():
            loop.on_validation_end(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save where closed loops are."""
        # Not in `state_dict`, which belongs to the technique.
        for place, loop in self._loops():
            checkpoint.setdefault(_SCHEDULES, {})[place] = loop.state_dict()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with closed loops."""
        for place, loop in self._loops():
            saved = checkpoint.get(_SCHEDULES, {}).get(place)
            if saved is not None:
                loop.load_state_dict(saved)

    def _loops(self) -> list[tuple[str, ClosedLoop]]:
        """The closed loops among the technique's numbers, inside other schedules too."""
        schedules = {n: v for n, v in vars(self).items() if isinstance(v, Schedule)}
        return [
            (f"{self.state_key}.{name}.{position}", loop)
            for name, schedule in schedules.items()
            for position, loop in enumerate(schedule.loops())
        ]

    def _led(self) -> TrainingStepPipeline | None:
        # One technique drives the pipeline, so that phases run in the planned order and not in
        # the order of the callbacks list.
        pipeline = self._pipeline
        return pipeline if pipeline is not None and pipeline.leader is self else None

    def _close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()

    def _check_strength(self, strength: float | Schedule) -> None:
        if isinstance(strength, Schedule):
            return
        finite = isinstance(strength, (int, float)) and abs(strength) != float("inf")
        if not finite or isinstance(strength, bool) or strength != strength:
            raise ArgumentError(
                self,
                f"`strength` must be a finite number or a Schedule, got {strength!r}",
                cure=f"{type(self).__name__}(strength=0.1)",
            )

    def __getstate__(self) -> dict[str, Any]:
        # The pipeline belongs to one Trainer and one module; a copy joins its own, and has the
        # hooks that the pipeline hides. Lightning hangs the module's own `log` on every callback,
        # and with it a copy would drag the module along.
        kept = {
            k: v
            for k, v in self.__dict__.items()
            if k not in ("log", "log_dict") and (v is not None or not hasattr(Callback, k))
        }
        return {**kept, "_pipeline": None}


@lru_cache
def snake_case(name: str) -> str:
    """``CamelCase`` to ``camel_case``; runs of capitals count as one word (``SAM`` to ``sam``)."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()


def overrides(technique: Regularizer, phase: str) -> bool:
    """Whether ``technique`` implements ``phase``."""
    implemented = getattr(type(technique), phase) is not getattr(Regularizer, phase)
    return implemented and technique.acts_in(phase)
