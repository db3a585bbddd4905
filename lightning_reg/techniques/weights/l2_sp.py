"""Pulls fine-tuned weights to the pretrained ones that training starts with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, ParameterUpdate, Schedule
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.sharding import whole
from lightning_reg.mechanisms.anchor import WeightAnchor
from lightning_reg.mechanisms.projection import ProximalStep

__all__ = ["L2SP", "l2_sp"]

Mode = Literal["gradient", "decoupled"]
_MODES = ("gradient", "decoupled")
_DECOUPLED_PHASES = ("edit_gradients", "project")


def l2_sp(weight: Tensor, start: Tensor) -> Tensor:
    """``1/2 sum_i (w_i - w0_i)^2``; its gradient is ``w - w0``.

    Args:
        weight: ``w``, any shape.
        start: ``w0``, the weight that training started with, of the same shape.

    Returns:
        A scalar, at least 0.
    """
    return (weight - start).square().sum() / 2


class L2SP(WeightAnchor, ProximalStep):
    """Pulls fine-tuned weights to the pretrained ones that training starts with (L2-SP).

    Li, Grandvalet, Davoine (2018), Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks, arXiv:1802.01483.

    ``R = alpha / 2 ||w_S - w0_S||^2 + beta / 2 ||w_N||^2``: weights ``w_S`` that were pretrained
    are pulled to where they start, ``w0``, and those of new layers ``w_N`` to zero. Ordinary
    weight decay pulls pretrained weights away from what they know.

    Formula confirmed against holyseven/TransferLearningClassification@1426356,
    model/network_base.py (decay mode 1: half the squares, weights without biases). There and in
    the paper it is a term of the loss; ``mode="decoupled"`` is ours, after AdamW: after each
    optimizer step ``w <- (w + lr alpha w0) / (1 + lr alpha)``, which adaptive optimizers do not
    rescale. ``beta / alpha = 0.1`` is the paper's ``beta = 0.01`` at ``alpha = 0.1``, one of the
    values that it searches, from memory.

    Args:
        strength: ``alpha``, at least 0.
        new: a regular expression on the names of parameters that were not pretrained; ``None`` if
            all were.
        new_ratio: ``beta / alpha``, at least 0.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers.
        mode: ``"gradient"`` adds the gradient once per optimizer step; ``"decoupled"`` pulls
            after the step, by the learning rate of its parameter group.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` or ``new_ratio`` is below 0, ``mode`` is neither of the two,
            ``new`` matches no chosen parameter, or no parameter is chosen.

    Note:
        Over ranks: replica; nothing is communicated. Cost per optimizer step: three passes over
        the weights, and a copy of them in memory and in checkpoints (they are not taken again on a
        resume). Load pretrained weights before the fit starts: in ``__init__``,
        ``configure_model`` or ``setup``. A second fit with the same instance pulls to the start of
        the first. Set the optimizer's ``weight_decay`` to 0. It hurts where the new task is far
        from the old one.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import L2SP
        >>> trainer = L.Trainer(callbacks=[L2SP(0.1, new="head")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
            "Li et al.",
            2018,
            "1802.01483",
        ),
    )
    writes: ClassVar[frozenset[str]] = frozenset({"gradients", "weights"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(l2_sp)
    explanation: ClassVar[str] = "pulls weights to those that training starts with"

    def __init__(
        self,
        strength: float | Schedule = 0.1,
        *,
        new: str | None = None,
        new_ratio: float = 0.1,
        parameters: str | ParameterSelection | None = None,
        mode: Mode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="L2SP(0.1)")
        check_range(self, "new_ratio", new_ratio, 0, cure="L2SP(new_ratio=0.1)")
        if mode not in _MODES:
            raise ArgumentError(
                self,
                f"`mode` must be one of {', '.join(_MODES)}, got {mode!r}",
                cure='L2SP(mode="gradient")',
            )
        self.new = new
        self.new_ratio = new_ratio
        self.mode = mode

    def acts_in(self, phase: str) -> bool:
        """As a gradient, or after the step."""
        return (phase in _DECOUPLED_PHASES) == (self.mode == "decoupled")

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an empty choice, and new layers that are not there."""
        super().validate(trainer, pl_module)
        chosen = self.selection.select(pl_module, self)
        if self.new is not None and not any(map(self._is_new, chosen)):
            raise ArgumentError(
                self,
                f"`new` = {self.new!r} matches none of the chosen parameters "
                f"{', '.join(list(chosen)[:12])}",
                cure='L2SP(new="head")',
            )

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the start, unless a checkpoint brought it."""
        super().on_reference(trainer, pl_module)
        if self.references_taken:
            return
        self.take_reference(pl_module)
        fresh = [t for name, t in self._reference.items() if self._is_new(name)]
        if fresh:
            torch._foreach_zero_(fresh)

    def parameter_gradient(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 6: the pull to the start, then that of new layers to zero."""
        weights = update.trainable(self.selected(update))
        names = [name for name in weights if name in self._reference]
        if not names:
            return None
        held = [weights[name] for name in names]
        ratios = self._ratios(names)
        parts, distances = _pulls(held, [self._reference[name] for name in names])
        gradients = torch._foreach_mul(distances, ratios)
        update.add_gradients(self, held, list(gradients))
        return _weighted(parts, ratios)

    def proximal(
        self, weights: Mapping[str, Tensor], steps: list[float]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Weights nearer to their start, and the penalty before."""
        names, held = list(weights), list(weights.values())
        # A layer that came later has no start, and is left free.
        starts = [whole(self._reference.get(n, w)).to(w) for n, w in weights.items()]
        ratios = self._ratios(names)
        parts, _ = _pulls(held, starts)
        pulls = [t * r for t, r in zip(steps, ratios, strict=True)]
        shares = [pull / (1 + pull) for pull in pulls]
        moved = torch._foreach_sub(starts, held)
        torch._foreach_mul_(moved, shares)
        return list(torch._foreach_add(held, list(moved))), _weighted(parts, ratios)

    def _ratios(self, names: Sequence[str]) -> list[float]:
        return [self.new_ratio if self._is_new(name) else 1.0 for name in names]

    def _is_new(self, name: str) -> bool:
        return self.new is not None and re.search(self.new, name) is not None


def _pulls(
    weights: Sequence[Tensor], starts: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """``||w - w0||^2 / 2`` and ``w - w0`` of each weight."""
    distances = list(torch._foreach_sub(list(weights), list(starts)))
    norms = torch._foreach_norm(distances)
    return [norm.square() / 2 for norm in norms], distances


def _weighted(parts: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    total = torch.stack(torch._foreach_mul(list(parts), list(ratios))).sum()
    return whole(total)
