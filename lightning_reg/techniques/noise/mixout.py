"""Replaces random parts of the weights by the weights that training started from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import ArgumentError, RegularizationError, check_range
from lightning_reg.mechanisms.forward_noise import ForwardNoise

__all__ = ["Mixout", "mixout"]

Mask = Literal["neuron", "weight"]
_MASKS = ("neuron", "weight")


def mixout(weight: Tensor, reference: Tensor, mask: Tensor, p: float) -> Tensor:
    """``[M W + (1 - M) W_ref - p W_ref] / (1 - p)``, which is ``W`` in the mean over ``M``.

    Args:
        weight: ``W``.
        reference: ``W_ref``, of the same shape.
        mask: ``M``, of a shape that broadcasts to it: 1 with probability ``1 - p``, else 0.
        p: the probability of the reference, in [0, 1).

    Returns:
        Of the shape of ``weight``; the gradient by ``weight`` is ``M / (1 - p)``.
    """
    return torch.addcmul(reference, weight - reference, mask, value=1 / (1 - p))


class Mixout(ForwardNoise):
    """Trains with weights of which a random part is replaced by the weights at the start.

    Lee, Cho, Kang (2019), Mixout: Effective Regularization to Finetune Large-scale Pretrained
    Language Models, arXiv:1909.11299.

    ``W_mix = [M W + (1 - M) W_ref - p W_ref] / (1 - p)`` with ``M ~ Bernoulli(1 - p)``, in
    training steps only. In the mean ``W_mix`` is ``W``, and for a convex loss the effect is that
    of a penalty ``p / (1 - p) ||W - W_ref||^2``: dropout pulls to 0, mixout to the pretrained
    weights. Its strength follows the curvature of the loss by itself.

    The forward pass was checked against the official code (bloodwass/mixout). There one mask
    serves all rows of a weight, so that an input neuron is mixed with all its connections:
    ``mask="neuron"``, the default. ``mask="weight"`` draws for each weight, the paper's
    mixconnect. The released code forgets the factor ``1/(1 - p)`` in the gradient; here it is
    there, as the formula says, so gradients are larger by that factor. It also takes
    ``p = 1``, which trains nothing and is refused here. The paper fine-tunes with ``p`` of 0.7
    to 0.9.

    Args:
        p: the probability with which a part of a weight is replaced, in [0, 1), or a
            :class:`Schedule`; 0 turns the technique off.
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            default: the weights of all Linear layers, as in the code. A head that starts from
            random numbers has no reference worth keeping: leave it out,
            ``ParameterSelection(types=["Linear"], exclude="head")``.
        mask: ``"neuron"`` or ``"weight"``.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if ``p`` is outside [0, 1), or before training, if nothing is selected.
        RegularizationError: at the start, if a checkpoint holds references of another shape.

    Note:
        The reference is a copy of the weights that training starts with, after pretrained
        weights are loaded; it is kept in checkpoints and not taken anew on a resume. Weights that
        are unfrozen later are referred to as they were while frozen. A new fit without a
        checkpoint takes a new reference.

        Over ranks: replica; one mask per optimizer step, the same on all ranks and in all
        micro-batches of the step, so that several of either equal one joint batch. A second pass
        (SAM) sees the same mask. No collective. Cost: one copy of the weights in memory, and per
        micro-batch a mask, a difference and a product over the weights.

        In the official recipe mixout takes the place of dropout. It hurts when the task is far
        from what the network was pretrained on. Do not use it under activation checkpointing,
        which runs layers again in the backward pass, when the weights are back.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import Mixout
        >>> trainer = L.Trainer(callbacks=[Mixout(p=0.7)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
            "Lee et al.",
            2019,
            "1909.11299",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mixout)
    explanation: ClassVar[str] = (
        "your step runs with weights of which a part is that of the start; one mask per "
        "optimizer step, the same on all ranks"
    )
    default_selection = ParameterSelection(types=("Linear",))

    def __init__(
        self,
        p: float | Schedule = 0.7,
        *,
        parameters: str | ParameterSelection | None = None,
        mask: Mask = "neuron",
        name: str | None = None,
    ) -> None:
        super().__init__(p, parameters=parameters, name=name)
        if not isinstance(p, Schedule):
            check_range(self, "p", p, 0, 1, high_open=True, cure="Mixout(p=0.7)")
        if mask not in _MASKS:
            raise ArgumentError(
                self,
                f"`mask` must be one of {', '.join(_MASKS)}, got {mask!r}",
                cure='Mixout(p=0.7, mask="neuron")',
            )
        self.mask = mask
        self._reference: dict[str, Tensor] = {}
        self._resumed = False

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what a checkpoint held; else forget an earlier fit and start from here."""
        if not self._resumed:
            self._reference = {}
        self._resumed = False
        for name, weight in self.selection.select(pl_module, self).items():
            self._refer(name, weight)

    def noisy_weights(
        self, weights: Mapping[str, Tensor], strength: float, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Mix every weight with its reference."""
        check_range(self, "p", strength, 0, 1, high_open=True, cure="Mixout(p=0.7)")
        masks = self._masks(weights, strength, generator)
        return {
            name: mixout(weight, self._refer(name, weight), masks[name].to(weight.dtype), strength)
            for name, weight in weights.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The reference."""
        return {"reference": dict(self._reference)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the reference of a checkpoint."""
        self._reference = dict(state_dict["reference"])
        self._resumed = True

    def _masks(
        self, weights: Mapping[str, Tensor], p: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """All masks from one draw."""
        rows = slice(None) if self.mask == "weight" else slice(1)
        shapes = {name: weight[rows].shape for name, weight in weights.items()}
        sizes = [shape.numel() for shape in shapes.values()]
        flat = torch.empty(sum(sizes), device=generator.device)
        parts = flat.bernoulli_(1 - p, generator=generator).split(sizes)
        return {name: m.view(s) for (name, s), m in zip(shapes.items(), parts, strict=True)}

    def _refer(self, name: str, weight: Tensor) -> Tensor:
        """The reference of a weight; one that was frozen up to now is its own."""
        if name not in self._reference:
            self._reference[name] = weight.detach().clone()
        reference = self._reference[name]
        if reference.shape != weight.shape:
            raise RegularizationError(
                self,
                f"the reference of {name} has shape {tuple(reference.shape)}, and the weight has "
                f"{tuple(weight.shape)}: the checkpoint is of another model",
                cure=f"Mixout(parameters=ParameterSelection(types=['Linear'], exclude='{name}'))",
            )
        if reference.device != weight.device or reference.dtype != weight.dtype:
            reference = self._reference[name] = reference.to(weight)
        return reference
