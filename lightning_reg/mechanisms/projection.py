"""Constraints on weights: after every optimizer step they are moved back to where they may be.

A technique supplies :meth:`Projection.project_weights`, the nearest allowed weights, or, for a
penalty that is not smooth, :meth:`ProximalStep.proximal`. The mechanism takes care of

- which weights: the chosen ones that are not frozen and that an optimizer owns, tied ones once;
- the moment: after an optimizer step and only then, not after each micro-batch;
- writing in place, so that optimizers and DDP go on with the same parameters, and in float32
  where weights are in half precision;
- a strength below 1: a projection is made to that share;
- the learning rate that each weight was stepped with, which a proximal step needs. It is taken
  before the step, since schedulers have moved on when the projection runs.

Weights are the same on every rank, so every rank projects them alike; those that FSDP2 shards are
gathered for it, all at the same time, and each rank keeps its part.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ParameterSelection, ParameterUpdate, Schedule
from lightning_reg.engine.sharding import whole, write
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.selected_weights import SelectedWeights, check_share


class Projection(SelectedWeights):
    """Base of techniques that project weights after each optimizer step.

    Args:
        strength: the share of the way to the projection, in [0, 1].
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            ``None`` takes the weights of all linear and convolutional layers.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "replica"
    sharded: ClassVar[bool | None] = True
    reads: ClassVar[frozenset[str]] = frozenset({"weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        check_share(self, strength)

    @abstractmethod
    def project_weights(
        self, update: ParameterUpdate, weights: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """The projection of each weight, and a value for the log.

        Args:
            update: the step that was made.
            weights: the weights by name, not to be changed.
        """

    def project(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 8."""
        weights = update.trainable(self.selected(update))
        if not weights:
            return None
        full = {name: full_precision(whole(w.detach())) for name, w in weights.items()}
        projected, value = self.project_weights(update, full)
        share = update.strength(self)
        if share != 1:
            projected = list(torch._foreach_lerp(list(full.values()), projected, share))
        write(list(weights.values()), projected)
        return value


class ProximalStep(SelectedWeights):
    """Base of penalties ``R`` that act by ``w <- prox(w)`` after each optimizer step.

    ``prox(w) = argmin_u |u - w|^2 / 2 + t R(u)`` with ``t`` = learning rate x strength.

    Args:
        strength: the multiplier of the penalty.
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            ``None`` takes the weights of all linear and convolutional layers.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "replica"
    sharded: ClassVar[bool | None] = True
    reads: ClassVar[frozenset[str]] = frozenset({"weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        self._rates: dict[nn.Parameter, float] = {}
        self._strength_of_step = 0.0

    @abstractmethod
    def proximal(
        self, weights: Mapping[str, Tensor], steps: list[float]
    ) -> tuple[list[Tensor], Tensor | None]:
        """``prox`` of each weight with its step ``t``, and a value for the log."""

    def edit_gradients(self, update: ParameterUpdate) -> None:
        """Phase 7: remember the learning rates and the strength of this step."""
        assert update.optimizer is not None
        wanted = update.trainable(self.selected(update)).values()
        rates = {p: group["lr"] for group in update.optimizer.param_groups for p in group["params"]}
        self._rates.update({weight: float(rates[weight]) for weight in wanted})
        self._strength_of_step = update.strength(self)

    def project(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 8: the weights that were stepped."""
        weights = {n: w for n, w in self.selected(update).items() if w in self._rates}
        if not weights:
            return None
        steps = [self._rates[w] * self._strength_of_step for w in weights.values()]
        full = {name: full_precision(whole(w.detach())) for name, w in weights.items()}
        moved, value = self.proximal(full, steps)
        write(list(weights.values()), moved)
        self._rates.clear()
        return value

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the module's weights."""
        super().on_fit_close(trainer, pl_module)
        self._rates.clear()

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_rates": {}}


__all__ = ["Projection", "ProximalStep"]
