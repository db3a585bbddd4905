"""Makes predictions under two dropout masks agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.mechanisms.two_passes import TwoPasses, symmetric_divergence

__all__ = ["RDrop", "r_drop"]


def r_drop(first: Tensor, second: Tensor) -> Tensor:
    """``(KL(p_1 || p_2) + KL(p_2 || p_1)) / 2`` of each row, in nats.

    Args:
        first: (..., C) logits under one dropout mask; gradients flow through both.
        second: (..., C) logits under another.

    Returns:
        (...), at least 0.
    """
    return symmetric_divergence(first, second)


class RDrop(TwoPasses):
    """Adds the divergence between predictions under two dropout masks (R-Drop).

    Liang, Wu, Li, Wang, Meng, Qin, Chen, Zhang, Liu (2021), R-Drop: Regularized Dropout for
    Neural Networks, arXiv:2106.14448.

    Each batch passes twice. The loss is ``(L_1 + L_2) / 2 + alpha (KL(p_1 || p_2) + KL(p_2 ||
    p_1)) / 2``: at inference dropout is off, and the divergence keeps the networks that it drew
    from in training near one another, and so near that one. Confirmed against dropreg/R-Drop
    (README.md and fairseq_src): the mean of both losses and of both directions, gradients through
    both passes. There the divergence is summed or averaged over the batch by the task; here it is
    a mean over rows. ``alpha = 1`` is its default for language understanding, 5 for translation,
    0.3 for vision.

    Args:
        strength: ``alpha``, at least 0; at 0 there is one pass and nothing changes.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are; targets are optional.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if ``strength`` is below 0.
        UnsupportedError: under manual optimization, and where weights are sharded over ranks.

    Note:
        Over ranks: global; the mean runs over the positions of all ranks, each counting once, for
        one all-reduce of two numbers a step; each rank and micro-batch draws its own masks. The
        user's logs, metrics and BatchNorm's running statistics are those of the first pass.
        Random numbers that other techniques draw are the same in both. Cost: a second forward
        and backward pass; the first step of a run takes one more.

        A network without dropout trains as before, at twice the cost. It slows fitting down: give
        it more epochs.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import RDrop
        >>> trainer = L.Trainer(callbacks=[RDrop(1.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "R-Drop: Regularized Dropout for Neural Networks", "Liang et al.", 2021, "2106.14448"
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(r_drop)
    explanation: ClassVar[str] = "runs each batch under two dropout masks that have to agree"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )

    def values(self, step: Step, first: Tensor, second: Tensor) -> Tensor:
        """The divergence of each row."""
        return r_drop(first, second)
