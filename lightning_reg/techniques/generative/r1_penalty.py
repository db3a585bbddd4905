"""Penalizes a critic's gradient at real samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule
from lightning_reg.mechanisms.critic_penalty import Critic, CriticPenalty, critic_gradient

__all__ = ["R1Penalty", "r1_penalty"]


def r1_penalty(critic: Critic, real: Tensor) -> Tensor:
    """``(1/2) ||dD(x)/dx||^2`` at each real sample ``x``.

    Args:
        critic: ``D``, takes (B, ...) and gives scores (B, ...), summed per sample.
        real: ``x`` (B, ...).

    Returns:
        (B,), with a graph to the critic's weights.
    """
    return 0.5 * critic_gradient(critic, real).square().sum(1)


class R1Penalty(CriticPenalty):
    """Keeps a GAN's critic flat where the data are, without which training need not converge.

    Mescheder, Geiger, Nowozin (2018), Which Training Methods for GANs do actually Converge?,
    arXiv:1801.04406. As one of the regularizers of Kang, Shin, Park (2022), StudioGAN: A Taxonomy
    and Benchmark of GANs for Image Synthesis, arXiv:2206.09479.

    The critic's loss becomes ``L_D + (gamma/2) E_real ||dD(x)/dx||^2``. The log shows the penalty
    with its factor 1/2. Values are those of POSTECH-CVLab/PyTorch-StudioGAN
    (``src/utils/losses.py``), which puts the factor 1/2 there too; NVlabs/stylegan2-ada-pytorch
    has the same loss with ``gamma/2`` outside. The default 10 is that of the latter and of the
    original paper (from memory); it depends on resolution and batch size.

    Lazy regularization (Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN,
    arXiv:1912.04958): with ``interval=16`` the penalty acts in every 16th batch with 16 times the
    gradient. StyleGAN2 takes a separate optimizer step for it and corrects Adam's learning rate
    and betas for the added steps; here, as in StudioGAN, it is part of the critic's own step, and
    nothing has to be corrected.

    Args:
        strength: ``gamma``.
        interval: act in every ``interval``-th training batch.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``interval`` is not a whole number from 1.
        UnsupportedError: under automatic optimization, and for a compiled critic.

    Note:
        Needs ``critic`` and ``real`` in the critic's call of ``self.regularize``; other calls of
        the step are left alone. For a conditional critic pass ``critic=lambda x: self.critic(x,
        y)``.

        Over ranks: global; the mean runs over the samples of all ranks, for one all-reduce of two
        numbers a call. Cost: one forward pass of the critic, a backward to its inputs, and a
        backward through both; the interval divides it. BatchNorm in the critic mixes samples.
        It hurts where ``gamma`` is so large that the critic can no longer tell samples apart.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import R1Penalty
        >>> trainer = L.Trainer(callbacks=[R1Penalty(10.0, interval=16)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "StudioGAN: A Taxonomy and Benchmark of GANs for Image Synthesis",
            "Kang et al.",
            2022,
            "2206.09479",
        ),
        Paper(
            "Which Training Methods for GANs do actually Converge?",
            "Mescheder et al.",
            2018,
            "1801.04406",
        ),
        Paper(
            "Analyzing and Improving the Image Quality of StyleGAN",
            "Karras et al.",
            2020,
            "1912.04958",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(r1_penalty)
    explanation: ClassVar[str] = "acts in the self.regularize call that hands over critic and real"

    def __init__(
        self, strength: float | Schedule = 10.0, *, interval: int = 1, name: str | None = None
    ) -> None:
        super().__init__(strength, interval=interval, name=name)

    def values(
        self, critic: Critic, real: Tensor, fake: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """Half the squared gradient at each real sample."""
        return r1_penalty(critic, real)
