"""Sharpness-aware techniques: the gradient is taken at weights that a first gradient points to.

A technique supplies :meth:`WeightPerturbation.perturbation`. The mechanism takes care of the
first pass (``autograd.grad``, so neither ``.grad`` nor DDP's hooks notice), of the window over
which sharpness is meant, of the second pass (same random numbers, silent logs, metrics and
BatchNorm counted once), of fp16 scaling, and of an exact restore.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.step import Step

Sharpness = Literal["micro", "rank", "global"]
_SHARPNESS = ("micro", "rank", "global")


class WeightPerturbation(Regularizer):
    """Base of techniques that differentiate the loss at perturbed weights.

    Args:
        strength: the size of the perturbation (``rho`` of SAM); 0 turns the technique off.
        sharpness: whose gradient the perturbation follows. ``"micro"``: of each micro-batch on
            its rank, one extra forward and backward each; ``"rank"``: of each rank's whole
            accumulation window; ``"global"``: of the window over all ranks, so that N ranks
            equal one process with the joined batch.
        steps: ascent steps before the gradient is taken.
        name: the name in logs and checkpoints.

    The log value is the rise of the loss from the clean to the perturbed weights.
    """

    writes: ClassVar[frozenset[str]] = frozenset({"weights"})
    reads: ClassVar[frozenset[str]] = frozenset({"losses", "weights"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"weight_perturbation"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        sharpness: Sharpness = "micro",
        steps: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, name=name)
        if sharpness not in _SHARPNESS:
            raise ArgumentError(
                self,
                f"`sharpness` must be one of {', '.join(_SHARPNESS)}, got {sharpness!r}",
                cure=f'{type(self).__name__}(sharpness="micro")',
            )
        if not isinstance(steps, int) or steps < 1:
            raise ArgumentError(
                self, f"`steps` must be a whole number from 1, got {steps!r}", cure="steps=1"
            )
        self.sharpness = sharpness
        self.steps = steps
        self._saved: list[Tensor] = []
        self._moved: list[nn.Parameter] = []
        self._window: list[Step] = []
        self._ascent: list[Tensor] | None = None

    @abstractmethod
    def perturbation(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], strength: float
    ) -> list[Tensor]:
        """The displacement of each weight, from gradients of the unscaled loss.

        Args:
            weights: the weights where the gradients were taken.
            gradients: one gradient a weight.
            strength: the size of the perturbation now.
        """

    def constrain(self, displacement: list[Tensor], strength: float) -> list[Tensor]:
        """The sum of several ascent steps, brought back to where it may be."""
        return displacement

    def perturb(self, step: Step, total: Tensor) -> Tensor:
        """Phase 5."""
        if self.sharpness == "micro":
            return self._perturb_micro(step, total)
        return self._perturb_window(step, total)

    def restore(self) -> None:
        """Write the saved weights back, bit for bit."""
        if self._moved:
            with torch.no_grad():
                torch._foreach_copy_(self._moved, self._saved)
            self._moved = []

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore after an exception between the two passes; free the buffers."""
        self.restore()
        self._saved, self._window, self._ascent = [], [], None

    # ------------------------------------------------------------------ one micro-batch

    def _perturb_micro(self, step: Step, total: Tensor) -> Tensor:
        weights = step.trainable_parameters()
        gradients = self._gradients(step, total, weights)
        second = self._ascend(step, weights, gradients, [step])
        step.log(self, second.detach() - total.detach())
        step.forget()
        return second

    # ------------------------------------------------------------------ a whole window

    def _perturb_window(self, step: Step, total: Tensor) -> Tensor:
        """Collect first-pass gradients; at the window's end replay all its micro-batches."""
        count = int(step.trainer.accumulate_grad_batches)
        weights = step.trainable_parameters()
        gradients = [g / count for g in self._gradients(step, total, weights)]
        self._window.append(step)
        if self._ascent is None:
            self._ascent = gradients
        else:
            torch._foreach_add_(self._ascent, gradients)
        if step.trainer.fit_loop._should_accumulate():
            # Nothing may reach `.grad` yet: only the value is handed on, on a leaf of its own.
            return total.detach() + torch.zeros_like(total, requires_grad=True)
        window, ascent = self._window, self._ascent
        self._window, self._ascent = [], None
        if self.sharpness == "global" and step.comm.world_size > 1:
            ascent = _mean_over_ranks(step, ascent)
        second = self._ascend(step, weights, ascent, window)
        step.log(self, second.detach() - total.detach())
        for micro in window[:-1]:
            # DDP's hooks are idle inside its forward, so these gradients stay local until the
            # last micro-batch's backward reduces the sum.
            _scale(step, micro.rerun() / count).backward()
            micro.forget()
        step.forget()
        return second

    def _ascend(
        self, step: Step, weights: list[nn.Parameter], gradients: list[Tensor], window: list[Step]
    ) -> Tensor:
        """Move the weights; returns the loss of the window's last micro-batch there."""
        strength = step.strength(self)
        self._save(weights)
        displacement: list[Tensor] | None = None
        for index in range(self.steps):
            if self._finite(step, gradients):
                move = self.perturbation(weights, gradients, strength)
                displacement = move if displacement is None else _sum(displacement, move)
                displacement = self.constrain(displacement, strength)
                self._place(displacement)
            if index + 1 < self.steps:
                gradients = self._window_gradients(step, weights, window)
        return window[-1].rerun()

    def _window_gradients(
        self, step: Step, weights: list[nn.Parameter], window: list[Step]
    ) -> list[Tensor]:
        parts = [self._gradients(step, micro.rerun(), weights) for micro in window]
        total = parts[0]
        for part in parts[1:]:
            torch._foreach_add_(total, part)
        if self.sharpness == "micro":
            return total
        torch._foreach_div_(total, int(step.trainer.accumulate_grad_batches))
        if self.sharpness == "global" and step.comm.world_size > 1:
            return _mean_over_ranks(step, total)
        return total

    def _gradients(self, step: Step, total: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
        """Gradients of the unscaled loss, taken through the AMP scale so that none underflows."""
        scaled = _scale(step, total)
        found = torch.autograd.grad(scaled, weights, allow_unused=True)
        gradients = [
            torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)
        ]
        if _scaler(step) is not None:
            torch._foreach_div_(gradients, _scale(step, torch.ones((), device=total.device)))
        return gradients

    def _finite(self, step: Step, gradients: list[Tensor]) -> bool:
        """Under fp16 an overflow on any rank skips the perturbation on all of them."""
        if _scaler(step) is None:
            return True
        norms = torch.stack(torch._foreach_norm(gradients))
        return not step.comm.any(~torch.isfinite(norms).all())

    def _save(self, weights: list[nn.Parameter]) -> None:
        if len(self._saved) != len(weights):
            self._saved = [torch.empty_like(w) for w in weights]
        with torch.no_grad():
            torch._foreach_copy_(self._saved, weights)
        self._moved = list(weights)

    def _place(self, displacement: list[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._moved, self._saved)
            torch._foreach_add_(self._moved, displacement)


def _sum(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_add(one, other))


def _scaler(step: Step) -> object | None:
    return getattr(step.trainer.precision_plugin, "scaler", None)


def _scale(step: Step, loss: Tensor) -> Tensor:
    scaler = _scaler(step)
    return loss if scaler is None else scaler.scale(loss)  # type: ignore[attr-defined,no-any-return]


def _mean_over_ranks(step: Step, tensors: list[Tensor]) -> list[Tensor]:
    """One collective for all tensors."""
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    flat = step.comm.reduce(flat, "mean")
    parts = flat.split([t.numel() for t in tensors])
    return [p.view_as(t).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]


__all__ = ["Sharpness", "WeightPerturbation"]
