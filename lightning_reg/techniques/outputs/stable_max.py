"""Replaces the softmax in the cross-entropy with a function that never saturates in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.criterion import as_distribution
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces

__all__ = ["StableMax", "stable_max"]


def stable_max(logits: Tensor, targets: Tensor) -> Tensor:
    """The StableMax cross-entropy of each row, in nats.

    ``p_c = s(z_c) / sum_k s(z_k)`` with ``s(z) = z + 1`` for ``z >= 0`` and ``1 / (1 - z)`` below,
    and ``L = -sum_c t_c log p_c``. Since ``log s(z) = sign(z) log(1 + |z|)``, ``p`` is the softmax
    of that logarithm, which is how it is computed, in float64 where the device has it.

    Args:
        logits: (N, C).
        targets: (N,) class indices, or (N, C) distributions.

    Returns:
        (N,), in the type of the logits, at least 0.
    """
    precise = logits if logits.device.type == "mps" else logits.double()
    log_p = F.log_softmax(_log_s(precise), dim=-1)
    return -(as_distribution(targets, log_p) * log_p).sum(-1).to(logits.dtype)


class StableMax(LossReplacement):
    """Replaces the softmax in the cross-entropy with a function that never saturates in float32.

    Prieto, Barsbey, Mediano, Birdal (2025), Grokking at the Edge of Numerical Stability,
    arXiv:2501.04697.

    ``p_c = s(z_c) / sum_k s(z_k)``, with ``s(z) = z + 1`` for ``z >= 0`` and ``1 / (1 - z)`` for
    ``z < 0``; the loss is ``-log p_y`` in nats. ``s`` grows linearly where the exponential of a
    softmax grows so fast that the sum rounds to its largest term: then the loss of a fitted
    sample is exactly 0 and learning stops, which the paper calls Softmax Collapse. Confirmed
    against the released code (utils.py), which computes it in float64, as here.

    Args:
        strength: the share of the new loss, in [0, 1]; the rest stays the cross-entropy.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy, ``"term"`` if that is one
            of its terms, ``"loss"`` to drop whatever it is.
        signals: where ``logits`` and ``targets`` are, if not in the usual places.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], or ``replaces`` is none of the three.

    Note:
        Over ranks: global; a mean over samples, for which nothing is communicated. Cost: a
        logarithm and a log-softmax in float64 over the logits (B, C).

        Probabilities of a model that was trained with it are those of StableMax: a softmax of its
        logits, as calibration metrics take it, is not what was fitted. It hurts where classes
        are many: probabilities fall off as one over the logit, so most of the mass lies on wrong
        classes for long.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import OrthoGrad, StableMax
        >>> trainer = L.Trainer(callbacks=[StableMax(), OrthoGrad()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Grokking at the Edge of Numerical Stability", "Prieto et al.", 2025, "2501.04697"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(stable_max)
    explanation: ClassVar[str] = "replaces the softmax of the loss with StableMax"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss of each row."""
        return stable_max(logits, distribution)


def _log_s(logits: Tensor) -> Tensor:
    """``log s(z)``; two branches, since the gradient of ``|z|`` at 0 would be 0 instead of 1."""
    negative = logits < 0
    above = torch.log1p(torch.where(negative, 0.0, logits))
    below = torch.log1p(torch.where(negative, -logits, 0.0))
    return torch.where(negative, -below, above)
