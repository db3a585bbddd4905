"""Penalizes a critic's gradient at generated samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule
from lightning_reg.mechanisms.critic_penalty import Critic, CriticPenalty, critic_gradient

__all__ = ["R2Penalty", "r2_penalty"]


def r2_penalty(critic: Critic, fake: Tensor) -> Tensor:
    """``(1/2) ||dD(x)/dx||^2`` at each generated sample ``x``.

    Args:
        critic: ``D``, takes (B, ...) and gives scores (B, ...), summed per sample.
        fake: ``x`` (B, ...); nothing flows back to the generator.

    Returns:
        (B,), with a graph to the critic's weights.
    """
    return 0.5 * critic_gradient(critic, fake).square().sum(1)


class R2Penalty(CriticPenalty):
    """Keeps a GAN's critic flat where the generator is: the twin of R1 at generated samples.

    Mescheder, Geiger, Nowozin (2018), Which Training Methods for GANs do actually Converge?,
    arXiv:1801.04406.

    The critic's loss becomes ``L_D + (gamma/2) E_fake ||dD(x)/dx||^2``, a penalty with center
    zero. Either of R1 and R2 makes training converge locally; together (two callbacks) they also
    hold where the two distributions have not met yet. The formula is that of R1Penalty, which was
    compared with released code, at other points; the default is that of R1Penalty.

    Args:
        strength: ``gamma``.
        interval: act in every ``interval``-th training batch, with ``interval`` times the gradient.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``interval`` is not a whole number from 1.
        UnsupportedError: under automatic optimization, and for a compiled critic.

    Note:
        Needs ``critic``, ``real`` and ``fake`` in the critic's call of ``self.regularize``; other
        calls of the step are left alone. Over ranks: global; the mean runs over the samples of all
        ranks, for one all-reduce of two numbers a call. Cost: one forward pass of the critic, a
        backward to its inputs, and a backward through both; the interval divides it. It hurts
        where ``gamma`` is so large that the critic can no longer tell samples apart.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import R1Penalty, R2Penalty
        >>> trainer = L.Trainer(callbacks=[R1Penalty(10.0), R2Penalty(10.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Which Training Methods for GANs do actually Converge?",
            "Mescheder et al.",
            2018,
            "1801.04406",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("critic", "real", "fake")
    function: ClassVar[Callable[..., Any] | None] = staticmethod(r2_penalty)
    explanation: ClassVar[str] = (
        "acts in the self.regularize call that hands over critic, real and fake"
    )

    def __init__(
        self, strength: float | Schedule = 10.0, *, interval: int = 1, name: str | None = None
    ) -> None:
        super().__init__(strength, interval=interval, name=name)

    def values(
        self, critic: Critic, real: Tensor, fake: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """Half the squared gradient at each generated sample."""
        assert fake is not None
        return r2_penalty(critic, fake)
