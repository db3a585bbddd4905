"""Shortens a step that would take the loss below what it can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, ParameterUpdate, Schedule, Step
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.gradient_transform import GradientTransform
from lightning_reg.mechanisms.selected_weights import EVERYTHING, dense_gradients

__all__ = ["TruncatedModelStep", "truncated_model_step"]


def truncated_model_step(
    loss: Tensor,
    gradients: Sequence[Tensor],
    rates: Sequence[float],
    lower_bound: float = 0.0,
) -> Tensor:
    """``min(1, (l - l_inf) / sum_i eta_i ||g_i||^2)``, what the step is multiplied by.

    The linear model of the loss falls by ``sum_i eta_i ||g_i||^2`` in a step of SGD; truncated at
    the lower bound, its minimum is reached before.

    Args:
        loss: ``l``, a scalar.
        gradients: ``g_i``, of any shapes.
        rates: ``eta_i``, the learning rate of each.
        lower_bound: ``l_inf``, what the loss cannot go below.

    Returns:
        A scalar in [0, 1].
    """
    squares = torch.stack([g.square().sum() for g in gradients])
    fall = torch.dot(squares, squares.new_tensor(list(rates)))
    room = (loss - lower_bound).clamp_min(0).to(fall)
    # Without a gradient nothing moves, whatever the factor.
    return torch.where(fall > room, room / fall, torch.ones_like(fall))


class TruncatedModelStep(GradientTransform):
    """Shortens a step that would take the loss below what it can be (truncated model, aProx).

    Chen, Orabona (2023), Generalized Implicit Follow-The-Regularized-Leader, arXiv:2306.00201,
    whose framework has it as the case of a truncated linear model; first Asi, Duchi (2018),
    Stochastic (Approximate) Proximal Point Methods, arXiv:1810.05633.

    ``w <- w - min(eta, (l_t - l_inf) / ||g||^2) g``: an implicit step on ``max(l_t + <g, w - w_t>,
    l_inf)`` in place of the linear model. For small learning rates it is plain SGD, for large
    ones the Polyak step, so that no learning rate makes a convex problem diverge.

    The formula is from memory of the paper, not checked against code, of which none was found.
    With parameter groups of several learning rates ``eta ||g||^2`` becomes ``sum_i eta_i
    ||g_i||^2``, the same step in the metric of the rates, which is ours.

    Args:
        strength: the share of the change that is made, in [0, 1].
        lower_bound: ``l_inf``, a number that the loss of a batch cannot go below. 0 holds for
            cross-entropies and squared errors; a label-smoothed loss has a larger one.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes every parameter, and anything less is shortened alone.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], ``lower_bound`` is not a finite number, or
            no parameter is chosen.

    Note:
        Over ranks: global; the loss is averaged over ranks and micro-batches, as the gradients
        are. Once per optimizer step. Cost: a norm and a pass over gradients, and one number to
        reduce. The log shows the factor. It is made for SGD: with momentum the step that is
        shortened is the new part only, and with Adam a factor that is the same for all gradients
        nearly cancels. The loss is the user's, without penalties; one that cannot reach its
        bound (noisy labels) is seldom shortened, and one below it does not move.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import TruncatedModelStep
        >>> trainer = L.Trainer(callbacks=[TruncatedModelStep()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Generalized Implicit Follow-The-Regularized-Leader",
            "Chen et al.",
            2023,
            "2306.00201",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    function: ClassVar[Callable[..., Any] | None] = staticmethod(truncated_model_step)
    explanation: ClassVar[str] = "shortens steps that would pass the loss's lower bound"
    default_selection = EVERYTHING

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        lower_bound: float = 0.0,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        check_range(self, "lower_bound", lower_bound, cure="TruncatedModelStep(lower_bound=0.0)")
        if abs(lower_bound) == float("inf"):
            raise ArgumentError(
                self,
                f"`lower_bound` must be finite, got {lower_bound!r}",
                cure="TruncatedModelStep(lower_bound=0.0)",
            )
        self.lower_bound = lower_bound
        self._losses: list[Tensor] = []
        self._loss: Tensor | None = None
        self._rates: list[float] = []

    def penalty(self, step: Step) -> Tensor | None:
        """Phase 4: nothing is added; the loss is remembered."""
        if step.loss is not None and not step.is_rerun:
            self._losses.append(step.loss.detach().float())
        return None

    def edit_gradients(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 7."""
        losses, self._losses = self._losses, []
        if not losses:
            return None
        self._loss = update.comm.reduce(torch.stack(losses).mean(), "mean")
        assert update.optimizer is not None
        groups = update.optimizer.param_groups
        rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        reached, _ = dense_gradients(self, update.trainable(self.selected(update)))
        self._rates = [rates[id(weight)] for weight in reached.values()]
        return super().edit_gradients(update)

    def transform(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Shorter gradients, and by how much."""
        assert self._loss is not None
        factor = truncated_model_step(self._loss, gradients, self._rates, self.lower_bound)
        return list(torch._foreach_mul(list(gradients), factor)), factor

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the losses."""
        super().on_fit_close(trainer, pl_module)
        self._losses, self._loss, self._rates = [], None, []

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_losses": [], "_loss": None, "_rates": []}
