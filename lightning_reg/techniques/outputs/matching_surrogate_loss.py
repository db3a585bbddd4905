"""Fits a neuron with a monotone activation by a convex loss, without its activation's slope."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Regularizer, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.technique import Semantics

__all__ = ["MatchingSurrogateLoss", "matching_surrogate_loss"]

Activation = Literal["identity", "relu", "leaky_relu", "sigmoid", "tanh", "exp", "probit"]
_SLOPE = 0.01


def _tanh(z: Tensor) -> Tensor:
    return z.abs() + torch.log1p(torch.exp(-2 * z.abs())) - math.log(2)


def _probit(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    below: Tensor = torch.special.ndtr(z)
    return z * below + density - 1 / math.sqrt(2 * math.pi)


# The integral of each activation from 0.
_PRIMITIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: 0.5 * z.square(),
    "relu": lambda z: 0.5 * z.clamp_min(0).square(),
    "leaky_relu": lambda z: 0.5 * torch.where(z < 0, _SLOPE, 1.0) * z.square(),
    "sigmoid": lambda z: F.softplus(z) - math.log(2),
    "tanh": _tanh,
    "exp": torch.expm1,
    "probit": _probit,
}


def matching_surrogate_loss(
    preactivation: Tensor, targets: Tensor, activation: Activation = "relu"
) -> Tensor:
    """``integral from 0 to z of (sigma(r) - y) dr``, whose gradient is ``sigma(z) - y``.

    Args:
        preactivation: ``z``, of any shape.
        targets: ``y``, of the same shape.
        activation: ``sigma``: ``"identity"``, ``"relu"``, ``"leaky_relu"`` (0.01), ``"sigmoid"``,
            ``"tanh"``, ``"exp"``, or ``"probit"``, the normal distribution's function.

    Returns:
        The shape of ``z``; convex in ``z``, and 0 at 0: it may be negative.
    """
    return _PRIMITIVES[activation](preactivation) - targets * preactivation


class MatchingSurrogateLoss(Regularizer):
    """Fits the output neuron of a regression by its matching loss, which is convex in it.

    Wang, Zarifis, Diakonikolas, Diakonikolas (2023), Robustly Learning a Single Neuron via
    Sharpness, arXiv:2306.07892.

    ``L(w) = E[ integral from 0 to w.x of (sigma(r) - y) dr ]`` has the gradient ``E[(sigma(w.x) -
    y) x]``: that of the squared loss without the factor ``sigma'(w.x)``, which is 0 where a ReLU is
    off and tiny where a sigmoid is saturated. So it is convex in ``w`` for every monotone
    ``sigma``, where the squared loss has plateaus and local minima; its stationary points are
    within a constant factor of the best squared error even if some labels are adversarial. With a
    sigmoid it is the binary cross-entropy less ``log 2``, with ``exp`` the Poisson loss. The paper
    minimizes it in a ball ``||w|| <= W``: :class:`MaxNorm` on the output layer. Formula from the
    paper's definition, checked by quadrature; no official code was found.

    It comes on top of your own loss. As the only one, which is what the paper does, let
    ``training_step`` return ``z.sum() * 0``. The mean runs over samples and outputs.

    Args:
        strength: the multiplier, at least 0.
        activation: ``"identity"``, ``"relu"``, ``"leaky_relu"``, ``"sigmoid"``, ``"tanh"``,
            ``"exp"`` or ``"probit"``: that of the output.
        signals: where ``z`` is (``logits``, *before* the activation) and ``targets``, of its
            shape or without its last dimension of one.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, or the activation is none of these.
        RegularizationError: in the first step, if shapes differ or targets are integers.

    Note:
        Over ranks: global; the mean runs over the samples of all ranks, for one all-reduce of two
        numbers a step. Cost: a few elementwise operations on the outputs.

        The value is no error, and may be negative. It trusts ``sigma``: of a ReLU that is off it
        says nothing for targets of 0, as the squared loss. Where few labels are wrong and the
        start is good, the squared loss of a ReLU can be nearer to the truth.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MatchingSurrogateLoss, Signals
        >>> signals = Signals(logits="module.head")
        >>> loss = MatchingSurrogateLoss(activation="sigmoid", signals=signals)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Robustly Learning a Single Neuron via Sharpness", "Wang et al.", 2023, "2306.07892"),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"logits", "targets"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(matching_surrogate_loss)
    explanation: ClassVar[str] = "adds a convex loss of the output before its activation"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        activation: Activation = "relu",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="MatchingSurrogateLoss(1.0)")
        if activation not in _PRIMITIVES:
            raise ArgumentError(
                self,
                f"`activation` must be one of {', '.join(_PRIMITIVES)}, got {activation!r}",
                cure='MatchingSurrogateLoss(activation="relu")',
            )
        self.activation = activation

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        z, targets = step.logits, torch.as_tensor(step.targets)
        if z.ndim == targets.ndim + 1 and z.shape[-1] == 1:
            z = z.squeeze(-1)
        if targets.shape != z.shape or not targets.is_floating_point():
            raise RegularizationError(
                self,
                "compares an output before its activation with a float target of its shape, got "
                f"{tuple(z.shape)} and {tuple(targets.shape)} of {targets.dtype}",
                cure='signals=Signals(logits="module.<head>", targets="batch.<key>")',
            )
        losses = matching_surrogate_loss(z, targets.to(z), self.activation)
        return JointMean.of(losses.flatten(1).mean(1) if losses.ndim > 1 else losses)
