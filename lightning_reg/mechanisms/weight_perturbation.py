"""Sharpness-aware techniques: the gradient is taken at weights that a first gradient points to.

A technique supplies :meth:`WeightPerturbation.perturbation`. It overrides
:meth:`WeightPerturbation.constrain` if several ascent steps have to stay in a ball,
:meth:`WeightPerturbation.combine` if the optimizer is to get more than the gradient at the
perturbed weights, :meth:`WeightPerturbation.first_gradients` and
:meth:`WeightPerturbation.second_loss` to save a part of a pass. The mechanism takes care of

- the first pass: ``autograd.grad``, so neither ``.grad`` nor the hooks of any DDP variant notice;
- the window over which sharpness is meant: one micro-batch, a rank's accumulation window, or that
  of all ranks;
- steps without a perturbation, where only every ``interval``-th one has it;
- the second pass: the same random numbers, silent logs, metrics and BatchNorm counted once;
- fp16 scaling: gradients pass through the scale, an overflow on one rank skips all perturbations;
- weights that FSDP2 shards: the first pass is a backward whose gradients, already the mean over
  ranks, are taken and cleared; norms are those of whole weights;
- an exact restore, after an exception too: the saved weights are written back, since ``w + e - e``
  is not ``w`` and replicas would drift apart.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine.carry import carry
from lightning_reg.engine.checks import check_sharded
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.sharding import (
    gradients_of,
    is_sharded,
    parts,
    put_weights_away,
    whole,
)
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.step import RunContext, Step
from lightning_reg.mechanisms.tensor_lists import filled, mean_over_ranks, sum_into

Sharpness = Literal["micro", "rank", "global"]
_SHARPNESS = ("micro", "rank", "global")


class WeightPerturbation(Regularizer):
    """Base of techniques that differentiate the loss at perturbed weights.

    Args:
        strength: the size of the perturbation (``rho`` of SAM); 0 turns the technique off.
        sharpness: whose gradient the perturbation follows. ``"micro"``: of each micro-batch on
            its rank, one extra forward and backward each; ``"rank"``: of each rank's whole
            accumulation window; ``"global"``: of the window over all ranks, so that N ranks
            equal one process with the joined batch. The last two keep the window's batches in
            memory until its end.
        steps: ascent steps before the gradient is taken; each costs one forward and backward.
        interval: perturb in every n-th optimizer step only.
        name: the name in logs and checkpoints.

    The log value is the rise of the loss from the clean to the perturbed weights. The loss that
    the Trainer and its callbacks see is the one at the clean weights.
    """

    writes: ClassVar[frozenset[str]] = frozenset({"weights"})
    reads: ClassVar[frozenset[str]] = frozenset({"losses", "weights"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"weight_perturbation"})
    sharded: ClassVar[bool | None] = True

    def __init__(
        self,
        strength: float | Schedule,
        *,
        sharpness: Sharpness = "micro",
        steps: int = 1,
        interval: int = 1,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        if sharpness not in _SHARPNESS:
            raise ArgumentError(
                self,
                f"`sharpness` must be one of {', '.join(_SHARPNESS)}, got {sharpness!r}",
                cure=f'{type(self).__name__}(sharpness="micro")',
            )
        for argument, value in (("steps", steps), ("interval", interval)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(
                    self,
                    f"`{argument}` must be a whole number from 1, got {value!r}",
                    cure=f"{type(self).__name__}({argument}=1)",
                )
        self.sharpness = sharpness
        self.steps = steps
        self.interval = interval
        self._saved: list[Tensor] = []
        self._moved: list[Tensor] = []
        self._window: list[Step] = []
        self._clean: list[Tensor] = []
        self._ascent: list[Tensor | None] = []
        self._kept: list[Tensor | None] = []
        self._kept_of: list[nn.Parameter] = []

    @abstractmethod
    def perturbation(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], strength: float
    ) -> list[Tensor]:
        """The displacement of each weight by one ascent step.

        Args:
            weights: the weights where the gradients were taken; DTensors where FSDP2 shards
                them, whose norms and sums are those of the whole.
            gradients: one gradient a weight, of the unscaled loss.
            strength: the size of the perturbation now.
        """

    def constrain(self, displacement: list[Tensor], strength: float) -> list[Tensor]:
        """The sum of the ascent steps so far, brought back to where it may be."""
        return displacement

    @property
    def combines(self) -> bool:
        """Whether :meth:`combine` is asked; fixed by the arguments."""
        return False

    @property
    def keeps_clean(self) -> bool:
        """Whether the gradient at the clean weights is wanted after the backward, to be taken."""
        return False

    def combine(
        self, weights: list[nn.Parameter], clean: list[Tensor], perturbed: list[Tensor]
    ) -> list[Tensor]:
        """What the optimizer gets.

        Both gradients are means over what ``sharpness`` says: a micro-batch, a rank's window, or
        that of all ranks. The second backward then runs before DDP's reduction, not along with it.
        """
        return perturbed

    def first_gradients(
        self, step: Step, total: Tensor, weights: list[nn.Parameter]
    ) -> list[Tensor | None]:
        """The gradient that the ascent follows; ``None`` for a weight that stays in place."""
        return _gradients(step, total, weights)

    def amp_scale(self, step: RunContext) -> Tensor | None:
        """What a loss has to be multiplied with, so that no fp16 gradient underflows."""
        scaler = _scaler(step)
        if scaler is None:
            return None
        scale: Tensor = scaler.scale(torch.ones((), device=step.device))
        return scale

    def second_loss(self, step: Step) -> tuple[Tensor, Tensor]:
        """At the perturbed weights: the loss that is differentiated, and the loss of the batch."""
        loss = step.rerun()
        return loss, loss.detach()

    def is_due(self, context: RunContext) -> bool:
        """Whether this optimizer step has a perturbation."""
        return context.global_step % self.interval == 0

    def active(self, context: RunContext) -> bool:
        """A window that was begun is finished, whatever became of the strength."""
        if self._window:
            return True
        off = isinstance(context, Step) and not self.is_due(context)
        return not off and context.strength(self) != 0

    def keep(self, weights: list[nn.Parameter], tensors: Sequence[Tensor]) -> None:
        """Remember one tensor a weight, at the scope of :meth:`combine`, until the step's end."""
        self._kept = sum_into(self._kept, list(tensors))
        self._kept_of = weights

    def take_kept(self, context: RunContext) -> dict[nn.Parameter, Tensor]:
        """The mean over micro-batches and ranks of what was kept; a collective of that size."""
        kept, self._kept = [t for t in self._kept if t is not None], []
        if not kept:
            return {}
        if self.sharpness == "micro":
            torch._foreach_div_(kept, float(context.trainer.accumulate_grad_batches))
        if self.sharpness != "global":
            kept = mean_over_ranks(context, kept)
        return dict(zip(self._kept_of, kept, strict=True))

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse the gradient of one rank where only that of all ranks exists."""
        super().validate(trainer, pl_module)
        check_sharded(
            trainer,
            self,
            self.sharpness != "global",
            f'follows the gradient of one rank (sharpness="{self.sharpness}")',
            cure=f'{type(self).__name__}(sharpness="global")',
        )

    def perturb(self, step: Step, total: Tensor) -> Tensor:
        """Phase 5."""
        if self.sharpness != "micro":
            return self._perturb_window(step, total)
        weights = step.trainable_parameters()
        gradients = filled(weights, self.first_gradients(step, total, weights))
        return self._both_passes(weights, gradients, [step], [total.detach()])

    def restore(self) -> None:
        """Write the saved weights back, bit for bit."""
        if self._moved:
            with torch.no_grad():
                torch._foreach_copy_(parts(self._moved), parts(self._saved))
            self._moved = []

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore after an exception between the two passes; free the buffers."""
        self.restore()
        self.__dict__.update(_no_run())

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a run under way stays with it.
        return {**super().__getstate__(), **_no_run()}

    # ------------------------------------------------------------------ a whole window

    def _perturb_window(self, step: Step, total: Tensor) -> Tensor:
        """Sum first-pass gradients; at the window's end take its second pass as a whole."""
        weights = step.trainable_parameters()
        self._ascent = sum_into(self._ascent, self.first_gradients(step, total, weights))
        for earlier in self._window[-1:]:
            earlier.drop_outputs()
        self._window.append(step)
        self._clean.append(total.detach())
        if step.trainer.fit_loop._should_accumulate():
            # The second pass brings this micro-batch's gradient: only the value is handed on.
            return carry(total.detach(), torch.zeros_like(total, requires_grad=True), [], [])
        window, clean, ascent = self._window, self._clean, self._ascent
        self._window, self._clean, self._ascent = [], [], []
        gradients = self._average(step, filled(weights, ascent))
        return self._both_passes(weights, gradients, window, clean)

    def _average(self, step: Step, total: list[Tensor]) -> list[Tensor]:
        """From a rank's sum over micro-batches to the gradient that ``sharpness`` asks for."""
        if self.sharpness == "micro":
            return total
        torch._foreach_div_(total, float(step.trainer.accumulate_grad_batches))
        if self.sharpness != "global" or is_sharded(total[0]):
            return total
        return mean_over_ranks(step, total)

    # ------------------------------------------------------------------ both passes

    def _both_passes(
        self,
        weights: list[nn.Parameter],
        gradients: list[Tensor],
        window: list[Step],
        clean: list[Tensor],
    ) -> Tensor:
        if self.keeps_clean:
            self.keep(weights, gradients)
        self._ascend(weights, gradients, window)
        if self.combines:
            return self._combined_pass(weights, gradients, window, clean)
        return self._second_pass(weights, window, clean)

    def _ascend(
        self, weights: list[nn.Parameter], gradients: list[Tensor], window: list[Step]
    ) -> None:
        """Move the weights to where the gradient is to be taken."""
        step = window[-1]
        strength = step.strength(self)
        self._save(weights)
        displacement: list[Tensor] = []
        for index in range(self.steps):
            if index > 0:
                gradients = self._window_gradients(weights, window)
            if not self._finite(step, gradients):
                continue
            with torch.no_grad():
                move = self.perturbation(weights, gradients, strength)
                again = bool(displacement)
                if again:
                    move = list(torch._foreach_add(displacement, move))  # type: ignore[arg-type]
                displacement = self.constrain(move, strength)
                self._place(displacement, again)
            if is_sharded(weights[0]):
                # Whole weights of the pass before are those without the displacement.
                put_weights_away(step.module)

    def _window_gradients(self, weights: list[nn.Parameter], window: list[Step]) -> list[Tensor]:
        total: list[Tensor | None] = []
        for micro in window:
            total = sum_into(total, self.first_gradients(micro, micro.rerun(), weights))
        return self._average(window[-1], filled(weights, total))

    def _second_pass(
        self, weights: list[nn.Parameter], window: list[Step], clean: list[Tensor]
    ) -> Tensor:
        """A loss with the clean value and the gradient at the perturbed weights.

        Gradients of earlier micro-batches are kept out of ``.grad``: the last one's backward
        carries them, so every kind of DDP sees one ordinary backward per window.
        """
        step, rise = window[-1], torch.zeros_like(clean[-1])
        carried: list[Tensor | None] = []
        for micro, loss in zip(window, clean, strict=True):
            second, value = self.second_loss(micro)
            micro.forget()
            rise += value - loss
            if micro is not step:
                carried = sum_into(carried, _gradients(micro, second, weights))
        step.log(self, rise / len(window))
        reached = [(w, g) for w, g in zip(weights, carried, strict=False) if g is not None]
        return carry(clean[-1], second, [g for _, g in reached], [w for w, _ in reached])

    def _combined_pass(
        self,
        weights: list[nn.Parameter],
        gradients: list[Tensor],
        window: list[Step],
        clean: list[Tensor],
    ) -> Tensor:
        """A loss with the clean value and the gradient that :meth:`combine` makes of both."""
        step, rise = window[-1], torch.zeros_like(clean[-1])
        total: list[Tensor | None] = []
        for micro, loss in zip(window, clean, strict=True):
            second, value = self.second_loss(micro)
            total = sum_into(total, _gradients(micro, second, weights))
            micro.forget()
            rise += value - loss
        step.log(self, rise / len(window))
        perturbed = self._average(step, filled(weights, total))
        with torch.no_grad():
            new = self.combine(weights, gradients, perturbed)
            if self.sharpness != "micro":
                # The backward divides by the number of micro-batches, as the mean has done.
                new = list(torch._foreach_mul(new, float(step.trainer.accumulate_grad_batches)))
        reached = [(w, n) for w, n, t in zip(weights, new, total, strict=True) if t is not None]
        nothing = torch.zeros_like(clean[-1], requires_grad=True)
        return carry(clean[-1], nothing, [n for _, n in reached], [w for w, _ in reached])

    def _finite(self, step: RunContext, gradients: list[Tensor]) -> bool:
        """Under fp16 an overflow on any rank skips the perturbation on all of them."""
        if _scaler(step) is None:
            return True
        norms = whole(torch.stack(torch._foreach_norm(gradients)))
        return not step.comm.any(~torch.isfinite(norms).all())

    def _save(self, weights: list[nn.Parameter]) -> None:
        if [w.shape for w in weights] != [s.shape for s in self._saved]:
            self._saved = [torch.empty_like(w, requires_grad=False) for w in weights]
        with torch.no_grad():
            torch._foreach_copy_(parts(self._saved), parts(weights))
        self._moved = list(weights)

    def _place(self, displacement: list[Tensor], again: bool) -> None:
        moved = parts(self._moved)
        if again:
            torch._foreach_copy_(moved, parts(self._saved))
        torch._foreach_add_(moved, parts(displacement))


def _no_run() -> dict[str, Any]:
    lists = ("_saved", "_moved", "_window", "_clean", "_ascent", "_kept", "_kept_of")
    return {key: [] for key in lists}


def _gradients(step: Step, total: Tensor, weights: list[nn.Parameter]) -> list[Tensor | None]:
    """Gradients of the unscaled loss, taken through the AMP scale so that none underflows.

    ``None`` where the loss does not reach a weight: the optimizer is to leave it alone.
    """
    scaler = _scaler(step)
    scaled = total if scaler is None else scaler.scale(total)
    found = gradients_of(scaled, weights)
    dense = [g.to_dense() if g is not None and g.is_sparse else g for g in found]
    present = [g for g in dense if g is not None]
    if scaler is None or not present:
        return dense
    scale = scaler.scale(torch.ones((), device=total.device))
    unscaled = iter(torch._foreach_div(present, scale))
    return [None if g is None else next(unscaled) for g in dense]


def _scaler(step: RunContext) -> Any:
    return getattr(step.trainer.precision_plugin, "scaler", None)


__all__ = ["Sharpness", "WeightPerturbation"]
