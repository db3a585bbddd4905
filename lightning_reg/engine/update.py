"""What a technique sees once per optimizer step: parameters and their summed gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_reg.engine.carry import carry
from lightning_reg.engine.sharding import own_parts, parts, with_parts
from lightning_reg.engine.split_work import Cost, Share
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
            self._owned = {id(p) for p in self._parameters()}
        return id(parameter) in self._owned

    def owned(self) -> list[nn.Parameter]:
        """The parameters that are updated, in the optimizers' order."""
        return [p for p in dict.fromkeys(self._parameters()) if p.requires_grad]

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
        penalty in the loss. Where weights are sharded over ranks, gradients are whole, or
        sharded as their weights are.
        """
        if not weights:
            return
        scale = self.strength(technique)
        extra = [g.to(w.dtype) for w, g in zip(weights, gradients, strict=True)]
        extra = own_parts(extra, weights)
        amp = self.gradient_scale()
        if amp is not None:
            extra = torch._foreach_mul(extra, amp.to(extra[0].device))  # type: ignore[assignment]
        present = [(w.grad, g) for w, g in zip(weights, extra, strict=True) if w.grad is not None]
        if present:
            grads, added = zip(*present, strict=True)
            torch._foreach_add_(parts(grads), list(added), alpha=scale)
        for weight, own in zip(weights, extra, strict=True):
            if weight.grad is None:
                weight.grad = with_parts(own * scale, weight)

    def plain_gradients(self, weights: Sequence[nn.Parameter]) -> list[Tensor] | None:
        """The gradients of weights, if it is as well to add to them piece by piece.

        That saves memory traffic on a CPU; elsewhere a call for each piece would cost more.
        ``None`` unless all weights lie whole in memory in single precision or more, with their
        gradients, and no AMP scale is in these.
        """
        found = [w.grad for w in weights if w.grad is not None]
        plain = all(
            type(t.data) is Tensor
            and t.device.type == "cpu"
            and t.is_contiguous()
            and t.dtype in (torch.float32, torch.float64)
            for t in (*weights, *found)
        )
        whole = len(found) == len(weights) and self.gradient_scale() is None
        return found if plain and whole else None

    def _parameters(self) -> list[nn.Parameter]:
        optimizers = [self.optimizer] if self.optimizer else list(self.trainer.optimizers)
        groups = [group for opt in optimizers for group in opt.param_groups]
        return [p for group in groups for p in group["params"]]

    def gradient_scale(self) -> Tensor | None:
        """The AMP scale, if ``.grad`` still carries it here (fused optimizers unscale later)."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if scaler is None or not fused:
            return None
        scale: Tensor = scaler.scale(torch.ones((), device=self.device))
        return scale


class SharedUpdate(ParameterUpdate):
    """Closed-form gradients in front of the backward that averages gradients over ranks.

    Each rank works on its share of the weights and scales it by the number of ranks, so that the
    mean which DDP takes anyway is the sum of all shares: no communication is added, and replicas
    stay bit-equal because every one of them gets the same reduced gradient. The loss carries the
    gradients into the backward (:meth:`carried_by`). An all-reduce of its own, after DDP's, would
    send as many bytes again, and could not run while the backward still computes.

    Args:
        pipeline: the pipeline of the run.
    """

    def __init__(self, pipeline: TrainingStepPipeline) -> None:
        super().__init__(pipeline, None)
        self._gradients: dict[nn.Parameter, Tensor | None] = {}

    def share(self, weights: Mapping[str, nn.Parameter], cost: Cost) -> Share:
        """This rank's part of the weights; the others are reached without a gradient."""
        for weight in weights.values():
            self._gradients.setdefault(weight, None)
        return Share(weights, self.comm, cost)

    def add_gradients(
        self, technique: Regularizer, weights: Sequence[nn.Parameter], gradients: Sequence[Tensor]
    ) -> None:
        """Keep ``strength * gradients`` of this rank's share for the backward."""
        if not weights:
            return
        scale = self.strength(technique) * self.comm.world_size
        scaled = torch._foreach_mul(list(gradients), scale)
        for weight, gradient in zip(weights, scaled, strict=True):
            before = self._gradients[weight]
            self._gradients[weight] = gradient if before is None else before + gradient

    def plain_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """There are no gradients yet."""

    def carried_by(self, total: Tensor) -> Tensor:
        """The loss of the last micro-batch, with a backward that brings the gradients.

        What comes back to the loss is the AMP scale over the number of accumulated micro-batches:
        the first belongs to the gradients as well, the second does not.
        """
        if not self._gradients:
            return total
        micro_batches = float(self.trainer.accumulate_grad_batches)
        gradients = [
            None if g is None else (g * micro_batches).to(w.dtype)
            for w, g in self._gradients.items()
        ]
        return carry(total.detach(), total, gradients, list(self._gradients))


__all__ = ["ParameterUpdate", "SharedUpdate"]
