"""What a technique sees once per optimizer step: parameters and their summed gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_reg.engine.step import RunContext

if TYPE_CHECKING:
    from lightning_reg.engine.pipeline import TrainingStepPipeline
    from lightning_reg.engine.regularizer import Regularizer


class ParameterUpdate(RunContext):
    """One optimizer step: gradients are summed over micro-batches and reduced over ranks.

    Args:
        pipeline: the pipeline of the run.
        optimizer: the optimizer that is about to step, or ``None`` after the step.
    """

    def __init__(
        self, pipeline: TrainingStepPipeline, optimizer: torch.optim.Optimizer | None
    ) -> None:
        super().__init__(pipeline)
        self.optimizer = optimizer
        self._owned: set[int] | None = None

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this optimizer updates ``parameter``; after the step: whether any does."""
        if self._owned is None:
            optimizers = [self.optimizer] if self.optimizer else list(self.trainer.optimizers)
            groups = [group for opt in optimizers for group in opt.param_groups]
            self._owned = {id(p) for group in groups for p in group["params"]}
        return id(parameter) in self._owned

    def trainable(self, selection: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The part of a selection that this optimizer owns and that is not frozen."""
        return {n: p for n, p in selection.items() if p.requires_grad and self.owns(p)}

    def rng(self, technique: Regularizer) -> torch.Generator:
        """A fresh generator, the same on all ranks, for one draw of this optimizer step."""
        return self._pipeline.generator(technique.name, True, "update", self.global_step)

    def add_gradients(
        self, technique: Regularizer, weights: Sequence[nn.Parameter], gradients: Sequence[Tensor]
    ) -> None:
        """Add ``strength * gradients`` to ``.grad``.

        A parameter that the loss did not reach gets its first gradient here, as it would from a
        penalty in the loss.
        """
        if not weights:
            return
        scale = self.strength(technique)
        extra = [g.to(w.dtype) for w, g in zip(weights, gradients, strict=True)]
        amp = self.gradient_scale()
        if amp is not None:
            extra = torch._foreach_mul(extra, amp.to(extra[0].device))  # type: ignore[assignment]
        present = [(w.grad, g) for w, g in zip(weights, extra, strict=True) if w.grad is not None]
        if present:
            grads, parts = zip(*present, strict=True)
            torch._foreach_add_(list(grads), list(parts), alpha=scale)
        for weight, part in zip(weights, extra, strict=True):
            if weight.grad is None:
                weight.grad = part * scale

    def gradient_scale(self) -> Tensor | None:
        """The AMP scale, if ``.grad`` still carries it here (fused optimizers unscale later)."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if scaler is None or not fused:
            return None
        scale: Tensor = scaler.scale(torch.ones((), device=self.device))
        return scale
