"""Runs all techniques of a Trainer inside the user's training step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.capture import Capture
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.criterion import Criterion
from lightning_reg.engine.data_hooks import check_data_hooks
from lightning_reg.engine.errors import RegularizationError, UnsupportedError
from lightning_reg.engine.idle_hooks import mute_idle_hooks, unmute_hooks
from lightning_reg.engine.patch import MethodPatch
from lightning_reg.engine.planner import Plan
from lightning_reg.engine.random import base_seed, rng_state, stream
from lightning_reg.engine.regularizer import (
    CRITERION_PHASES,
    WEIGHT_PHASES,
    Regularizer,
    overrides,
)
from lightning_reg.engine.rerun import replayed_rng, without_trace
from lightning_reg.engine.sampler import padding_mask
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.signals import SignalReader
from lightning_reg.engine.step import Step
from lightning_reg.engine.update import ParameterUpdate

_SHARDED = ("FSDP", "ModelParallel", "DeepSpeed", "XLA")
_LOSS_PHASES = (*CRITERION_PHASES, "penalty")


class TrainingStepPipeline:
    """The techniques of one Trainer at work on one LightningModule.

    The only place that patches anything: ``training_step`` on the instance, since no Lightning
    hook lets a callback change the loss, and ``configure_model``, the last moment at which a
    parameter may be replaced. Everything is undone by :meth:`close`.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.trainer = trainer
        self.module = module
        self.plan = Plan.of(trainer.callbacks)  # type: ignore[attr-defined]
        self.leader = next(c for c in trainer.callbacks if isinstance(c, Regularizer))  # type: ignore[attr-defined]
        self.comm = Communicator.of(trainer)
        self.batch_idx = 0
        self.applied: set[str] = set()
        self.step: Step | None = None
        self.writing: Callable[[Regularizer], AbstractContextManager[None]] = _unwatched
        self._seed = base_seed()
        self._capture = Capture()
        self._criterion = Criterion()
        self._readers = {t.name: SignalReader(t, module) for t in self.plan.techniques}
        self._patches: list[MethodPatch] = []
        self._ready: list[Regularizer] = []
        self._logs: dict[str, list[Tensor | float]] = defaultdict(list)
        self._last_global_step = 0
        self._total_steps = 0.0
        self._rerun_checked = False
        self._applied_checked = False
        self._replay: dict[int, tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = {}

    # ------------------------------------------------------------------ life

    @classmethod
    def attach(cls, trainer: pl.Trainer, module: pl.LightningModule) -> TrainingStepPipeline:
        """Plan, check, and patch the module; techniques know the pipeline from then on."""
        pipeline = cls(trainer, module)
        pipeline._check_strategy()
        pipeline._check_manual()
        for technique in pipeline.plan.techniques:
            technique._pipeline = pipeline
        step = MethodPatch(module, "training_step", pipeline.training_step)
        ready = MethodPatch(module, "configure_model", pipeline.configure_model, transparent=False)
        pipeline._patches += [step, ready]
        return pipeline

    def configure_model(self, original: Any) -> None:
        """The user's ``configure_model``, then the techniques that change the module."""
        original()
        for technique in self.plan.techniques:
            technique.validate(self.trainer, self.module)
        for technique in self.plan.techniques:
            self._ready.append(technique)
            technique.on_model_ready(self.trainer, self.module)

    def on_train_start(self) -> None:
        """Start to watch submodules; take references."""
        check_data_hooks(self.trainer)
        layers = {layer for t in self.plan.techniques for layer in self._layers(t)}
        self._capture.attach(self.module, layers)
        self._last_global_step = int(self.trainer.global_step)
        self._total_steps = float(self.trainer.estimated_stepping_batches)
        for technique in self.plan.techniques:
            technique.on_reference(self.trainer, self.module)
        mute_idle_hooks(self.plan.techniques, self.leader)

    @property
    def users_step(self) -> Callable[..., Any]:
        """The user's own training step, without any technique."""
        original: Callable[..., Any] = self._patches[0].original
        return original

    def close(self) -> None:
        """Undo everything; safe to call twice and after an exception at any point."""
        unmute_hooks(self.plan.techniques)
        for technique in self.plan.techniques:
            technique._pipeline = None
        self._capture.detach()
        self._replay.clear()
        while self._ready:
            self._ready.pop().on_fit_close(self.trainer, self.module)
        while self._patches:
            self._patches.pop().undo()

    # ------------------------------------------------------------------ phases 1 to 5

    def training_step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """What the Trainer calls in place of the user's training step."""
        args, kwargs, batch = _split(args, kwargs)
        step = Step(self, batch, self.batch_idx)
        self.step = step
        for technique in self._members("prepare", self.plan.techniques):
            technique.prepare(step.asked_by(technique))
        active = self._active(step)
        for technique in self._members("transform_batch", active):
            technique.transform_batch(step.asked_by(technique))
        replayed = self._members("perturb", active)
        if replayed:
            self._remember(step, original, args, kwargs)
        total = self._evaluate(step, active, original, args, kwargs)
        if total is None:
            return step.outputs
        for technique in replayed:
            self._check_rerun(technique, step, total)
            with self.writing(technique):
                total = technique.perturb(step.asked_by(technique), total)
        return _with_loss(step.outputs, total)

    def _evaluate(
        self,
        step: Step,
        active: Sequence[Regularizer],
        original: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Phases 2 to 4: the loss that is to be differentiated, or None if there is none."""
        with ExitStack() as stack:
            for technique in self._members("forward_context", active):
                stack.enter_context(technique.forward_context(step.asked_by(technique)))
            step.records = stack.enter_context(self._capture.recording())
            step.outputs = original(step.batch, *args, **kwargs)
        loss = _loss_of(step.outputs)
        if loss is None or not self.module.automatic_optimization:
            return None
        step.loss = loss
        return self._regularized(step, active)

    def _regularized(self, step: Step, active: Sequence[Regularizer]) -> Tensor:
        """Phases 3 and 4."""
        assert step.loss is not None
        total = step.loss
        with torch.autocast(step.loss.device.type, enabled=False):
            if self._criterion.concerns(step, active):
                total = self._criterion(step, active)
            for technique in self._members("penalty", active):
                value = technique.penalty(step.asked_by(technique))
                if value is not None:
                    total = total + self.strength(technique) * value
                    if not step.is_rerun:
                        step.log(technique, value.detach())
        return total

    def regularize(self, loss: Tensor, given: dict[str, Any]) -> Tensor:
        """Phases 3 and 4 for one loss of a manual optimization."""
        step = self.step
        if step is None:
            raise RegularizationError(
                "self.regularize", "was called outside `training_step`", cure="see RegularizeMixin"
            )
        step.given, step.loss, step.outputs = given, loss, None
        step.records = self._capture.now()
        active = [t for t in self._active(step) if self._served(t, given)]
        self.applied.update(t.name for t in active)
        return self._regularized(step, active)

    def rerun(self, step: Step) -> Tensor:
        """Phases 2 to 4 of ``step`` once more, without a trace; see :meth:`Step.rerun`."""
        state, original, args, kwargs = self._replay[id(step)]
        outputs, loss, records = step.outputs, step.loss, step.records
        distribution = step.target_distribution
        step.is_rerun = True
        try:
            with without_trace(self.module), replayed_rng(state, self._devices()):
                total = self._evaluate(step, self._active(step), original, args, kwargs)
        finally:
            step.is_rerun = False
            step.outputs, step.loss, step.records = outputs, loss, records
            step.target_distribution = distribution
        if total is None:
            raise UnsupportedError(
                "lightning_reg", "`training_step` returned a loss first and None when run again"
            )
        return total

    def forget(self, step: Step) -> None:
        """Drop what a re-run of ``step`` would need."""
        self._replay.pop(id(step), None)

    # ------------------------------------------------------------------ phases 6 to 8

    def on_train_batch_start(self, batch_idx: int) -> None:
        """Remember the position in the epoch, which survives a resume."""
        self.batch_idx = batch_idx

    def on_after_backward(self) -> None:
        """Give techniques that moved the weights the chance to move them back."""
        for technique in self.plan.phases["perturb"]:
            technique.restore()  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Closed-form gradients, then gradient edits; gradients are unscaled and reduced here."""
        update = ParameterUpdate(self, optimizer)
        with torch.no_grad():
            for phase in ("parameter_gradient", "edit_gradients"):
                for technique in self.plan.phases[phase]:
                    if technique.active(update):
                        with self.writing(technique):
                            value = getattr(technique, phase)(update)
                        update.log(technique, value)

    def on_train_batch_end(self) -> None:
        """Project if an optimizer stepped, then write the log."""
        if int(self.trainer.global_step) != self._last_global_step:
            self._last_global_step = int(self.trainer.global_step)
            update = ParameterUpdate(self, None)
            with torch.no_grad():
                for technique in self.plan.phases["project"]:
                    if technique.active(update):
                        with self.writing(technique):
                            value = technique.project(update)
                        update.log(technique, value)
            self._flush_logs()
        self._check_applied()
        self.step = None

    # ------------------------------------------------------------------ services

    def strength(self, technique: Regularizer) -> float:
        """The strength of ``technique`` at this point of the run."""
        strength = technique.strength
        if not isinstance(strength, Schedule):
            return strength
        return strength.value(
            step=int(self.trainer.global_step),
            epoch=int(self.trainer.current_epoch),
            progress=self.progress(),
        )

    def progress(self) -> float:
        """The share of the planned optimizer steps that is done; 0 for an endless run."""
        if not 0 < self._total_steps < float("inf"):
            return 0.0
        return min(1.0, int(self.trainer.global_step) / self._total_steps)

    def logging(self) -> bool:
        """Whether the Trainer writes this step's values."""
        return bool(self.trainer._logger_connector.should_update_logs)  # type: ignore[attr-defined]

    def collect_log(self, technique: Regularizer, value: Tensor | float, suffix: str = "") -> None:
        """Keep a value for the log of this optimizer step; micro-batches are averaged."""
        key = f"reg/{technique.name}" + (f"_{suffix}" if suffix else "")
        self._logs[key].append(value.detach() if isinstance(value, Tensor) else float(value))

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizers update, in the module's order."""
        update = ParameterUpdate(self, None)
        return [p for p in self.module.parameters() if p.requires_grad and update.owns(p)]

    def generator(self, name: str, shared: bool, per: str, *count: int) -> torch.Generator:
        """A fresh counter-based generator; no state has to be saved for an exact resume."""
        rank = -1 if shared else self.comm.rank
        return stream(self.module.device, self._seed, name, per, *count, rank)

    def reader(self, technique: Regularizer) -> SignalReader:
        """Where ``technique`` looks for its signals."""
        return self._readers[technique.name]

    def padding(self, batch_idx: int, size: int) -> Tensor | None:
        """Which samples of this rank's micro-batch a DistributedSampler repeated."""
        return padding_mask(self.trainer.train_dataloader, batch_idx, size, self.module.device)

    # ------------------------------------------------------------------ internals

    def _active(self, step: Step) -> list[Regularizer]:
        return [t for t in self.plan.techniques if t.active(step)]

    def _members(self, phase: str, active: Sequence[Regularizer]) -> list[Regularizer]:
        members = self.plan.phases[phase]
        return [t for t in members if t in active] if members else []

    def _layers(self, technique: Regularizer) -> set[str]:
        layers = set(getattr(technique, "layers", ()))
        named = {layer for layer in layers if not layer.startswith("outputs.")}
        return named | self.reader(technique).layers()

    def _devices(self) -> list[torch.device]:
        return [self.module.device] if self.module.device.type != "cpu" else []

    def _remember(
        self, step: Step, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        state = rng_state(self._devices())
        self._replay[id(step)] = (state, original, args, kwargs)

    def _served(self, technique: Regularizer, given: dict[str, Any]) -> bool:
        """Whether one ``self.regularize`` call hands ``technique`` what it needs."""
        if not any(overrides(technique, phase) for phase in _LOSS_PHASES):
            return False
        batch_signals = ("inputs", "targets", "sample_index", "domain")
        needed = [signal for signal in technique.needs if signal not in batch_signals]
        return all(given.get(signal) is not None for signal in needed)

    def _check_rerun(self, technique: Regularizer, step: Step, total: Tensor) -> None:
        """On the first step: is a second pass of the user's step the same as the first?"""
        if self._rerun_checked:
            return
        name = type(technique).__name__
        try:
            again = float(self.rerun(step).detach())
        except RegularizationError:
            raise
        except Exception as error:
            raise UnsupportedError(
                technique,
                f"runs training_step twice per batch, and the second run failed with {error!r}",
                cure=f"remove {name}, or keep no graph or state between calls of training_step",
            ) from error
        first = float(total.detach())
        if abs(first - again) > 1e-3 * max(1.0, abs(first)):
            raise UnsupportedError(
                technique,
                "runs training_step twice per batch, but with the same weights, batch and random "
                f"numbers the second run gave loss {again:.6f} after {first:.6f}: the step keeps "
                "state between calls (a hidden state, a counter) or writes into its batch",
                cure=f"make training_step repeatable, or remove {name}",
            )
        self._rerun_checked = True

    def _check_strategy(self) -> None:
        strategy = type(self.trainer.strategy).__name__
        if not any(word in strategy for word in _SHARDED):
            return
        for technique in self.plan.techniques:
            in_forward = overrides(technique, "forward_context") and "weights" in technique.writes
            if in_forward or any(overrides(technique, phase) for phase in WEIGHT_PHASES):
                raise UnsupportedError(
                    technique,
                    f"acts on whole weights, which {strategy} splits over ranks",
                    cure='Trainer(strategy="ddp_reg")',
                )

    def _check_manual(self) -> None:
        if self.module.automatic_optimization:
            return
        for technique in self.plan.techniques:
            in_loss = any(overrides(technique, phase) for phase in _LOSS_PHASES)
            if overrides(technique, "perturb"):
                raise UnsupportedError(
                    technique,
                    "needs the Trainer's own backward; this module optimizes manually",
                    cure="self.automatic_optimization = True",
                )
            if in_loss and not hasattr(self.module, "regularize"):
                raise UnsupportedError(
                    technique,
                    "changes the loss, which only your step knows under manual optimization",
                    cure="class Module(RegularizeMixin, LightningModule) and "
                    "self.manual_backward(self.regularize(loss, logits=logits))",
                )

    def _check_applied(self) -> None:
        """Under manual optimization: did each technique find its tensors in some call?"""
        if self.module.automatic_optimization or self.step is None or self._applied_checked:
            return
        self._applied_checked = True
        if self.step.mixes and self.step.target_distribution is None:
            raise RegularizationError(
                self.step.mixers[0],
                "mixed the samples of the batch, and no `self.regularize` call of the first "
                "training step mixed their labels",
                cure="self.manual_backward(self.regularize(loss, logits=logits))",
            )
        for technique in self._active(self.step):
            in_loss = any(overrides(technique, phase) for phase in _LOSS_PHASES)
            if in_loss and technique.name not in self.applied:
                raise RegularizationError(
                    technique,
                    "was not applied by any `self.regularize` call of the first training step; "
                    f"it needs {', '.join(technique.needs) or 'one call'}",
                    cure="self.regularize(loss, "
                    + ", ".join(f"{need}=..." for need in technique.needs)
                    + ")",
                )

    def _flush_logs(self) -> None:
        """One collective for all values of a logging step."""
        if not self._logs:
            return
        device = self.module.device
        keys = sorted(self._logs)
        rows = [
            torch.stack([torch.as_tensor(v, device=device).float().reshape(()) for v in values])
            for values in (self._logs[key] for key in keys)
        ]
        means = torch.stack([row.mean() for row in rows])
        if self.comm.world_size > 1:
            means = self.comm.reduce(means, "mean")
        self._logs.clear()
        for key, value in zip(keys, means.unbind(), strict=True):
            self.module.log(key, value, on_step=True, on_epoch=False)


def _unwatched(technique: Regularizer) -> AbstractContextManager[None]:
    """A strategy that keeps account of who writes weights puts its own in this place."""
    return nullcontext()


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """The batch, and the other arguments of a training step."""
    if args:
        return args[1:], kwargs, args[0]
    rest = dict(kwargs)
    return (), rest, rest.pop("batch")


def _loss_of(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Tensor):
        return outputs
    if hasattr(outputs, "get") and isinstance(outputs.get("loss"), Tensor):
        loss: Tensor = outputs["loss"]
        return loss
    return None


def _with_loss(outputs: Any, loss: Tensor) -> Any:
    """What the user's step returned, with another loss; the user's own object is not touched."""
    if isinstance(outputs, Tensor):
        return loss
    replaced = outputs.copy() if hasattr(outputs, "copy") else dict(outputs)
    replaced["loss"] = loss
    return replaced
