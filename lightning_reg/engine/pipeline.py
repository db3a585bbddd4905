"""Runs all techniques of a Trainer inside the user's training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.batch_rows import batch_size, take_rows
from lightning_reg.engine.capture import Capture
from lightning_reg.engine.checks import (
    acts_in_loss,
    check_applied,
    check_manual,
    check_rerun,
    check_sharded_alike,
    check_strategy,
)
from lightning_reg.engine.criterion import Criterion
from lightning_reg.engine.data_hooks import check_data_hooks
from lightning_reg.engine.errors import RegularizationError, UnsupportedError
from lightning_reg.engine.idle_hooks import mute_idle_hooks, unmute_hooks
from lightning_reg.engine.observe import StepWatcher
from lightning_reg.engine.outputs import loss_of, split_arguments, with_loss
from lightning_reg.engine.patch import MethodPatch
from lightning_reg.engine.penalties import penalties
from lightning_reg.engine.planner import Plan
from lightning_reg.engine.random import base_seed, reseed_torch, rng_state
from lightning_reg.engine.regularizer import (
    Regularizer,
)
from lightning_reg.engine.rerun import replayed_rng, second_pass, without_trace
from lightning_reg.engine.resume import checked_load
from lightning_reg.engine.services import RunServices
from lightning_reg.engine.sharding import put_weights_away, shards_weights
from lightning_reg.engine.signals import SignalReader
from lightning_reg.engine.step import Step
from lightning_reg.engine.update import ParameterUpdate, SharedUpdate


class TrainingStepPipeline(RunServices):
    """The techniques of one Trainer at work on one LightningModule.

    The only place that patches anything: ``training_step`` on the instance, since no Lightning
    hook lets a callback change the loss; ``configure_model``, the last moment at which a
    parameter may be replaced; and the strategy's ``load_checkpoint``, the last at which nothing
    is loaded yet. Everything is undone by :meth:`close`.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        plan = Plan.of(trainer.callbacks)  # type: ignore[attr-defined]
        super().__init__(trainer, module, plan, base_seed())
        self.leader = next(c for c in trainer.callbacks if isinstance(c, Regularizer))  # type: ignore[attr-defined]
        self.batch_idx = 0
        self.applied: set[str] = set()
        self.step: Step | None = None
        self.writing: Callable[[Regularizer], AbstractContextManager[None]] = _unwatched
        self._capture = Capture()
        self._criterion = Criterion()
        self._watchers = [c for c in trainer.callbacks if isinstance(c, StepWatcher)]  # type: ignore[attr-defined]
        self._looking: list[Regularizer | StepWatcher] = [*self.plan.techniques, *self._watchers]
        self._readers = {t.name: SignalReader(t, module) for t in self._looking}  # type: ignore[arg-type]
        self._patches: list[MethodPatch] = []
        self._ready: list[Regularizer] = []
        self._last_global_step = 0
        self._rerun_checked = False
        self._applied_checked = False
        self._split: list[Regularizer] = []

    # ------------------------------------------------------------------ life

    @classmethod
    def attach(cls, trainer: pl.Trainer, module: pl.LightningModule) -> TrainingStepPipeline:
        """Plan, check, and patch the module; techniques know the pipeline from then on."""
        pipeline = cls(trainer, module)
        check_strategy(trainer, pipeline.plan.techniques)
        check_manual(module, pipeline.plan.techniques)
        for technique in pipeline.plan.techniques:
            technique._pipeline = pipeline
        step = MethodPatch(module, "training_step", pipeline.training_step)
        ready = MethodPatch(module, "configure_model", pipeline.configure_model, transparent=False)
        load = MethodPatch(
            trainer.strategy,
            "load_checkpoint",
            partial(checked_load, trainer, pipeline.plan.techniques),
        )
        pipeline._patches += [step, ready, load]
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
        # Those that a sanity check gathered.
        put_weights_away(self.module)
        check_sharded_alike(self.module, self.plan.techniques)
        layers = {layer for t in self._looking for layer in self._layers(t)}
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
        while self._ready:
            self._ready.pop().on_fit_close(self.trainer, self.module)
        while self._patches:
            self._patches.pop().undo()

    # ------------------------------------------------------------------ phases 1 to 5

    def training_step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """What the Trainer calls in place of the user's training step."""
        args, kwargs, batch = split_arguments(args, kwargs)
        step = Step(self, batch, self.batch_idx)
        self.step = step
        for technique in self._members("prepare", self.plan.techniques):
            technique.prepare(step.asked_by(technique))
        active = self._active(step)
        if not active and not self._watchers:
            # Nothing is recorded or kept either: outputs that are held longer cost memory and time.
            return original(step.batch, *args, **kwargs)
        for technique in self._members("transform_batch", active):
            technique.transform_batch(step.asked_by(technique))
        # At the clean weights, unseen by a first pass that is to find the direction, and before
        # the collective of phase 4, which brings their values to the log.
        shared = self._shared_gradients()
        replayed = self._members("perturb", active)
        if replayed:
            step.replay = (rng_state(self._devices()), original, args, kwargs)
        total = self._evaluate(step, active, original, args, kwargs)
        if total is None:
            self._split = []
            return step.outputs
        for technique in replayed:
            if not self._rerun_checked:
                check_rerun(technique, total, partial(self._run_again, step))
                self._rerun_checked = True
            with self.writing(technique):
                total = technique.perturb(step.asked_by(technique), total)
        return with_loss(step.outputs, total if shared is None else shared.carried_by(total))

    def _shared_gradients(self) -> SharedUpdate | None:
        """Phase 6 of techniques that split their work, if the coming backward is the last."""
        self._split = []
        if self.averages is None or not self.averages():
            return None
        update = SharedUpdate(self)
        with torch.no_grad(), torch.autocast(self.module.device.type, enabled=False):
            for technique in self.plan.phases["parameter_gradient"]:
                if technique.splits and technique.active(update):
                    update.log(technique, technique.parameter_gradient(update))
                    self._split.append(technique)
        return update

    def _evaluate(
        self,
        step: Step,
        active: Sequence[Regularizer],
        original: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Phases 2 to 4: the loss that is to be differentiated, or None if there is none."""
        self._forward(step, active, original, args, kwargs)
        loss = loss_of(step.outputs)
        if loss is None or not self.module.automatic_optimization:
            return None
        step.loss = loss
        return self._regularized(step, active)

    def _forward(
        self,
        step: Step,
        active: Sequence[Regularizer],
        original: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Phase 2."""
        with ExitStack() as stack:
            for technique in self._members("forward_context", active):
                stack.enter_context(technique.forward_context(step.asked_by(technique)))
            step.records = stack.enter_context(self._capture.recording())
            step.outputs = original(step.batch, *args, **kwargs)
        for watcher in self._watchers if not step.is_rerun else ():
            with torch.no_grad(), torch.autocast(self.module.device.type, enabled=False):
                watcher.watch(step.asked_by(watcher))  # type: ignore[arg-type]

    def _regularized(self, step: Step, active: Sequence[Regularizer]) -> Tensor:
        """Phases 3 and 4."""
        assert step.loss is not None
        total = step.loss
        members = self._members("penalty", active)
        scaling = self._members("scale_loss", active)
        replaced = self._criterion.concerns(step, active)
        if not members and not scaling and not replaced:
            return total
        with torch.autocast(step.loss.device.type, enabled=False):
            if replaced:
                total = self._criterion(step, active)
            # A factor of 0, too: what only the loss reaches would be unused parameters to DDP.
            for technique in scaling:
                total = total * technique.scale_loss(step.asked_by(technique))
            for technique, value in penalties(step, members, self._log):
                total = total + self.strength(technique) * value
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

    def rerun(
        self,
        step: Step,
        read: Callable[[], Tensor] | None = None,
        look: Callable[[], object] | None = None,
        fresh: torch.Generator | None = None,
    ) -> Tensor:
        """Phases 2 to 4 of ``step`` once more, without a trace; see :meth:`Step.rerun`."""
        assert step.replay is not None
        state, *call = step.replay
        active = self._active(step)
        with (
            second_pass(step),
            without_trace(self.module),
            replayed_rng(state, self._devices()),
        ):
            if fresh is not None:
                reseed_torch(fresh.initial_seed(), self._devices())
            if read is not None:
                self._forward(step, active, *call)
                return read()
            total = self._evaluate(step, active, *call)
            if look is not None:
                look()
        if total is None:
            raise UnsupportedError(
                "lightning_reg", "`training_step` returned a loss first and None when run again"
            )
        return total

    def _run_again(self, step: Step) -> Tensor:
        """A second pass whose value, too, is that of all ranks."""
        counts, step.joint_counts = step.joint_counts, {}
        try:
            return self.rerun(step)
        finally:
            step.joint_counts = counts

    def part(self, step: Step, rows: Tensor) -> Step:
        """See :meth:`Step.part`."""
        size = batch_size(step.batch)
        part = Step(self, take_rows(step.batch, rows, size), step.batch_idx)
        index = step.sample_index
        part._index = None if index is None else index[rows]
        part.rows, part.whole_size, part.given = rows, size, step.given
        part.replay = step.replay
        return part

    # ------------------------------------------------------------------ phases 6 to 8

    def on_train_batch_start(self, batch_idx: int) -> None:
        """Remember the position in the epoch, which survives a resume."""
        self.batch_idx = batch_idx

    def on_after_backward(self) -> None:
        """Give techniques that moved the weights the chance to move them back."""
        for technique in self.plan.phases["perturb"]:
            technique.restore()  # type: ignore[attr-defined]
        if self._holds_weights:
            put_weights_away(self.module)
            self._holds_weights = False

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Closed-form gradients, then gradient edits; gradients are unscaled and reduced here."""
        update = ParameterUpdate(self, optimizer)
        with torch.no_grad():
            for phase in ("parameter_gradient", "edit_gradients"):
                for technique in self.plan.phases[phase]:
                    brought = phase == "parameter_gradient" and technique in self._split
                    if technique.active(update) and not brought:
                        with self.writing(technique):
                            value = getattr(technique, phase)(update)
                        update.log(technique, value, joint=technique.semantics != "local")
        self._split = []

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
                        update.log(technique, value, joint=technique.semantics != "local")
            self._log.flush(self.module, self.comm)
        if self.step is not None and not self._applied_checked:
            self._applied_checked = True
            check_applied(self.module, self.step, self._active(self.step), self.applied)
        self.step = None

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizers update, in the module's order."""
        update = ParameterUpdate(self, None)
        if shards_weights(self.trainer):
            # In the middle of a step the module may hold gathered weights in their place.
            return update.owned()
        return [p for p in self.module.parameters() if p.requires_grad and update.owns(p)]

    # ------------------------------------------------------------------ internals

    def _active(self, step: Step) -> list[Regularizer]:
        return [t for t in self.plan.techniques if t.active(step)]

    def _members(self, phase: str, active: Sequence[Regularizer]) -> list[Regularizer]:
        members = self.plan.phases[phase]
        return [t for t in members if t in active] if members else []

    def _layers(self, technique: Regularizer | StepWatcher) -> set[str]:
        layers = set(getattr(technique, "layers", ()))
        named = {layer for layer in layers if not layer.startswith("outputs.")}
        return named | self._readers[technique.name].layers()

    def _devices(self) -> list[torch.device]:
        return [self.module.device] if self.module.device.type != "cpu" else []

    def _served(self, technique: Regularizer, given: dict[str, Any]) -> bool:
        """Whether one ``self.regularize`` call hands ``technique`` what it needs."""
        if not acts_in_loss(technique):
            return False
        batch_signals = ("inputs", "targets", "sample_index", "domain")
        needed = [signal for signal in technique.needs if signal not in batch_signals]
        return all(given.get(signal) is not None for signal in needed)


def _unwatched(technique: Regularizer) -> AbstractContextManager[None]:
    """A strategy that keeps account of who writes weights puts its own in this place."""
    return nullcontext()
