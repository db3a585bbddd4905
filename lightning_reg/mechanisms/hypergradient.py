"""Tunes the strength of another technique by the gradient of a validation loss.

An optimizer step moves the weights to ``w' = w - eta (g + strength * r)`` with the gradient ``r``
of the tuned penalty, so ``dL_val(w') / dstrength = -eta <grad L_val(w'), r>``. A subclass may
override :meth:`HypergradientTuner.hypergradient` for a longer view (an implicit gradient puts the
inverse Hessian between the two). The mechanism takes care of

- the gradient ``r`` of the tuned technique alone, whether it is a penalty in the loss or a
  closed-form gradient, summed over micro-batches and averaged over ranks;
- the validation gradient at the weights behind the step, without a trace in logs and metrics;
- the step on the strength, its bounds, its log, and its state: a resumed run goes on with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_reg.engine import ParameterUpdate, Regularizer, Schedule, Step, UnsupportedError
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.observe import Observer, evaluating, sparing_collections
from lightning_reg.engine.penalties import penalties
from lightning_reg.engine.regularizer import overrides
from lightning_reg.engine.rerun import without_trace
from lightning_reg.engine.technique import Semantics


class HypergradientTuner(Regularizer):
    """Descends the validation loss by the strength of another technique of the Trainer.

    Plain gradient descent is assumed of the optimizer: with momentum or Adam the sign of the
    hypergradient still tells whether the penalty helps, its size is another.

    Args:
        tunes: the name (``reg/<name>``) of the technique whose strength is tuned.
        loader: validation batches as the training step takes them; gone through again and again,
            one batch for each optimizer step.
        lr: the step size on the strength; 0 only logs the hypergradient.
        low: the least strength.
        high: the largest strength.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    reads: ClassVar[frozenset[str]] = frozenset({"losses", "weights"})
    sharded: ClassVar[bool | None] = False

    def __init__(
        self,
        tunes: str,
        loader: Iterable[Any],
        *,
        lr: float = 0.1,
        low: float = 0.0,
        high: float = math.inf,
        name: str | None = None,
    ) -> None:
        super().__init__(1.0, name=name)
        owner = type(self).__name__
        check_range(self, "lr", lr, 0, cure=f"{owner}('norm_loss', loader, lr=0.1)")
        check_range(self, "low", low, 0, high, cure=f"{owner}('norm_loss', loader, low=0.0)")
        self.tunes, self.loader = tunes, loader
        self.lr, self.low, self.high = lr, low, high
        self.tuned: float | None = None
        self._before: float | None = None
        self._direction: dict[nn.Parameter, Tensor] = {}
        self._batches: Iterator[Any] = iter(())

    def hypergradient(
        self, validation: Sequence[Tensor], direction: Sequence[Tensor], rates: Sequence[float]
    ) -> Tensor:
        """The derivative of the validation loss by the strength: here one step ahead.

        Args:
            validation: the gradient of the validation loss by each weight, behind the step.
            direction: the gradient ``r`` of the tuned penalty by each weight, in front of it.
            rates: the learning rate of each weight.
        """
        products = torch._foreach_mul(list(validation), list(direction))
        sums = [p.sum() * -rate for p, rate in zip(products, rates, strict=True)]
        return torch.stack(sums).sum()

    # ------------------------------------------------------------------ phases

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a technique that is not there or has no strength of its own to tune."""
        target = self._target(trainer)
        if isinstance(target.strength, Schedule):
            raise UnsupportedError(
                self,
                f"tunes the strength of {self.tunes!r}, which follows a Schedule already",
                cure=f"{type(target).__name__}(strength=0.01)",
            )
        if not overrides(target, "penalty") and not overrides(target, "parameter_gradient"):
            raise UnsupportedError(
                self,
                f"tunes a penalty, and {type(target).__name__} adds none to the loss",
                cure='tunes="<the name of a technique that logs reg/<name>>"',
            )

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand the technique the strength that a resumed run had come to."""
        target = self._target(trainer)
        self._before = float(target.strength)  # type: ignore[arg-type]
        if self.tuned is not None:
            target.strength = self.tuned

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The technique gets back the strength that its user gave; ``tuned`` keeps the result."""
        if self._before is not None:
            self._target(trainer).strength = self._before
        self._before = None
        self._direction, self._batches = {}, iter(())

    def penalty(self, step: Step) -> None:
        """Phase 4: the gradient of a penalty in the loss; adds nothing to it."""
        target = self._target(step.trainer)
        if step.is_rerun or not overrides(target, "penalty"):
            return
        values = [value for _, value in penalties(step, [target]) if value.requires_grad]
        if not values:
            return
        weights = step.trainable_parameters()
        found = torch.autograd.grad(
            values, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        share = 1.0 / step.trainer.accumulate_grad_batches
        self._add(weights, [g * share for g in found])

    def parameter_gradient(self, update: ParameterUpdate) -> None:
        """Phase 6: the gradient of a closed form; leaves ``.grad`` as it is."""
        target = self._target(update.trainer)
        if not overrides(target, "parameter_gradient"):
            return
        weights = [p for p in update.module.parameters() if p.requires_grad and update.owns(p)]
        kept, strength = [w.grad for w in weights], target.strength
        try:
            for weight in weights:
                weight.grad = None
            target.strength = 1.0
            target.parameter_gradient(update)
            reached = {w: w.grad for w in weights if w.grad is not None}
        finally:
            target.strength = strength
            for weight, gradient in zip(weights, kept, strict=True):
                weight.grad = gradient
        scale = update.gradient_scale()
        # Every rank has the same: the mean over ranks, which is taken later, changes nothing.
        self._add(
            list(reached), [g if scale is None else g / scale.to(g) for g in reached.values()]
        )

    def project(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 8: behind the step, move the strength."""
        if not self._direction:
            return None
        weights, direction = list(self._direction), list(self._direction.values())
        self._direction = {}
        validation = self._validation_gradient(update, weights)
        flat = torch.cat([t.reshape(-1) for t in [*validation, *direction]])
        sizes = [w.numel() for w in weights]
        parts = update.comm.reduce(flat, "mean").split([*sizes, *sizes])
        half = len(weights)
        slope = self.hypergradient(parts[:half], parts[half:], _rates(update, weights))
        update.log(self, slope, "hypergradient", joint=True)
        target = self._target(update.trainer)
        if bool(slope.isfinite()):
            moved = float(target.strength) - self.lr * float(slope)  # type: ignore[arg-type]
            self.tuned = target.strength = min(max(moved, self.low), self.high)
        return torch.tensor(float(target.strength))  # type: ignore[arg-type]

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The strength that was come to."""
        return {"tuned": self.tuned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.tuned = state_dict["tuned"]

    # ------------------------------------------------------------------ internals

    def _target(self, trainer: pl.Trainer) -> Regularizer:
        techniques = [c for c in trainer.callbacks if isinstance(c, Regularizer)]  # type: ignore[attr-defined]
        named = {t.name: t for t in techniques if t is not self}
        if self.tunes not in named:
            raise ArgumentError(
                self,
                f"`tunes` is {self.tunes!r}, and the Trainer has {', '.join(named) or 'no other'}",
                cure=f"{type(self).__name__}({next(iter(named), 'norm_loss')!r}, loader)",
            )
        return named[self.tunes]

    def _add(self, weights: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            old = self._direction.get(weight)
            self._direction[weight] = gradient.clone() if old is None else old + gradient

    def _validation_gradient(
        self, update: ParameterUpdate, weights: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        module, trainer = update.module, update.trainer
        assert self.pipeline is not None
        step = self.pipeline.users_step
        args = [0] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else []
        batch = trainer.precision_plugin.convert_input(self._next())
        batch = trainer.strategy.batch_to_device(batch)
        observer = Observer(self, trainer, module, "training_step")
        try:
            with evaluating(module), without_trace(module), sparing_collections(module):
                with torch.enable_grad(), trainer.precision_plugin.forward_context():
                    outputs = observer.observe(lambda b: step(b, *args), batch).outputs
                    loss = outputs if isinstance(outputs, Tensor) else outputs["loss"]
                found = torch.autograd.grad(
                    loss, list(weights), allow_unused=True, materialize_grads=True
                )
        finally:
            observer.close()
        return list(found)

    def _next(self) -> Any:
        for batch in self._batches:
            return batch
        self._batches = iter(self.loader)
        return next(self._batches)

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a run under way stays with it.
        return {**super().__getstate__(), "_direction": {}, "_batches": iter(()), "_before": None}


def _rates(update: ParameterUpdate, weights: Sequence[nn.Parameter]) -> list[float]:
    """The learning rate of each weight."""
    groups = [group for opt in update.trainer.optimizers for group in opt.param_groups]
    rates = {p: float(group["lr"]) for group in groups for p in group["params"]}
    return [rates[w] for w in weights]


__all__ = ["HypergradientTuner"]
