"""Keeps the normalizer of the softmax near one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.output_penalty import OutputPenalty

__all__ = ["PaLMZLoss", "palm_z_loss"]


def palm_z_loss(logits: Tensor) -> Tensor:
    """``log^2 Z`` of each row, ``Z = sum_c exp(z_c)``.

    Args:
        logits: (..., C).

    Returns:
        (...), at least 0. The gradient is ``2 log Z softmax(z)``.
    """
    return logits.logsumexp(-1).square()


class PaLMZLoss(OutputPenalty):
    """Pulls the log-normalizer of the softmax to 0, so that logits cannot drift (z-loss).

    Chowdhery et al. (2022), PaLM: Scaling Language Modeling with Pathways, arXiv:2204.02311. Not
    the Z-loss of the spherical family, which is :class:`SphericalZLoss`.

    The loss becomes ``CE + lambda log^2 Z`` with ``Z = sum_c exp(z_c)``. The cross-entropy leaves
    one direction free, a shift of all logits alike; in half precision logits that have drifted
    far are rounded coarsely, and training becomes unstable. ``lambda = 1e-4`` is the paper's.
    The form is that of t5x (``cross_entropy_with_logits``), seen in copies of its losses.

    Args:
        strength: ``lambda``, at least 0.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are; targets are optional.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0.
        RegularizationError: in the first step, if there are fewer than two classes.

    Note:
        Over ranks: global; the mean runs over the positions of all ranks, each counting once, for
        one all-reduce of two numbers a step. Under accumulation each micro-batch takes its own
        mean. Cost: a log-sum-exp over the logits.

        A large ``lambda`` works against confidence as well: where one logit is far above the
        others, ``log Z`` is that logit.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import PaLMZLoss
        >>> trainer = L.Trainer(callbacks=[PaLMZLoss(1e-4)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "PaLM: Scaling Language Modeling with Pathways",
            "Chowdhery et al.",
            2022,
            "2204.02311",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(palm_z_loss)
    explanation: ClassVar[str] = "adds log^2 of the softmax's normalizer"

    def __init__(
        self,
        strength: float | Schedule = 1e-4,
        *,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="PaLMZLoss(1e-4)")

    def values(self, logits: Tensor) -> Tensor:
        """The penalty of each row."""
        return palm_z_loss(logits)
