"""Edits of the gradient of your loss by that of a second loss, which itself trains nothing.

A technique supplies :meth:`SecondGradient.second_loss`, a scalar of each micro-batch, and
:meth:`SecondGradient.combine`, the new gradient from both. The mechanism takes care of

- the second gradient: by the chosen weights, without a trace in ``.grad`` and without DDP's hooks;
  a weight that it does not reach has a second gradient of 0;
- accumulation and ranks: both gradients are those of the joint batch of an optimizer step before
  they are combined, by one collective;
- the moment: once per optimizer step, before Lightning clips gradients;
- AMP: both gradients without the loss scale, the second one differentiated through it;
- half precision: the technique computes in float32;
- a shared random stream, so that replicas stay equal;
- second passes over a batch, whose second loss does not count again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine import ParameterSelection, ParameterUpdate, Schedule, Signals, Step
from lightning_reg.engine.sharding import gradients_of
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.selected_weights import (
    EVERYTHING,
    SelectedWeights,
    check_share,
    dense_gradients,
)


class SecondGradient(SelectedWeights):
    """Base of techniques that ask a second loss about the gradient of the first.

    Args:
        strength: the share of the change that is made, in [0, 1].
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            ``None`` takes all that learn.
        signals: where the technique finds its tensors.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    sharded: ClassVar[bool | None] = False
    reads: ClassVar[frozenset[str]] = frozenset({"gradients", "logits"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradients"})
    default_selection = EVERYTHING

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        parameters: str | ParameterSelection | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        check_share(self, strength)
        self.signals = signals
        self._second: dict[str, Tensor] = {}

    @abstractmethod
    def second_loss(self, step: Step) -> Tensor | None:
        """The second loss, a mean over this rank's samples; ``None`` for none in this step."""

    @abstractmethod
    def combine(
        self, own: Tensor, second: Tensor, share: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The new gradient, and a value for the log.

        Args:
            own: (D,), the gradient of your loss by all chosen weights, behind one another.
            second: (D,), that of the second loss.
            share: the strength now.
            generator: the same on all ranks.
        """

    def penalty(self, step: Step) -> None:
        """Phase 4: no penalty, but the gradient of the second loss, which is kept."""
        if step.is_rerun:
            return
        loss = self.second_loss(step)
        if loss is None:
            return
        step.log(self, loss.detach(), "second_loss")
        weights = self._learning(step)
        for name, gradient in self._gradients(step, loss, weights).items():
            before = self._second.get(name)
            self._second[name] = gradient if before is None else before + gradient

    def edit_gradients(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 7."""
        chosen = update.trainable(self.selected(update))
        weights, gradients = dense_gradients(self, chosen)
        second = {name: self._second.pop(name, None) for name in chosen}
        found = [second[name] for name in weights]
        if not weights:
            return None
        scale = update.gradient_scale()
        own = torch.cat([full_precision(g).reshape(-1) for g in gradients])
        other = torch.cat(
            [
                torch.zeros_like(full_precision(w)).reshape(-1) if g is None else g.reshape(-1)
                for w, g in zip(weights.values(), found, strict=True)
            ]
        )
        if scale is not None:
            own = own / scale
        other = update.comm.reduce(other, "mean")
        changed, value = self.combine(own, other, update.strength(self), update.rng(self))
        if scale is not None:
            changed = changed * scale
        parts = changed.split([g.numel() for g in gradients])
        shaped = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(gradients, shaped)
        return value

    def _learning(self, step: Step) -> dict[str, nn.Parameter]:
        return {n: w for n, w in self.selected(step).items() if w.requires_grad}

    def _gradients(
        self, step: Step, loss: Tensor, weights: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """The gradients of one micro-batch, as its share of the accumulated ones."""
        if not loss.requires_grad:
            return {}
        scaler = getattr(step.trainer.precision_plugin, "scaler", None)
        one = torch.ones((), device=loss.device)
        scale = one if scaler is None else scaler.scale(one)
        found = gradients_of(loss * scale, list(weights.values()), retain_graph=True)
        accumulated = step.trainer.accumulate_grad_batches
        share = scale * (accumulated if step.module.automatic_optimization else 1)
        return {
            name: full_precision(gradient.detach()) / share
            for name, gradient in zip(weights, found, strict=True)
            if gradient is not None
        }

    def on_reference(self, trainer: Any, pl_module: Any) -> None:
        """A run starts with no gradient left over from another."""
        super().on_reference(trainer, pl_module)
        self._second = {}

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_second": {}}


__all__ = ["SecondGradient"]
