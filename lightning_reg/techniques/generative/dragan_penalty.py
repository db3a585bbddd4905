"""Holds a critic's gradient at length one around real samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.critic_penalty import (
    Critic,
    CriticPenalty,
    critic_gradient,
    length_penalty,
)

__all__ = ["DraganPenalty", "dragan_penalty"]


def dragan_penalty(
    critic: Critic,
    real: Tensor,
    noise: Tensor,
    alpha: Tensor,
    center: float = 1.0,
    one_sided: bool = False,
) -> Tensor:
    """``(||dD(x)/dx|| - c)^2`` at ``x = real + alpha * noise``.

    Args:
        critic: ``D``, takes (B, ...) and gives scores (B, ...), summed per sample.
        real: (B, ...).
        noise: (B, ...): the farthest points.
        alpha: (B,), in [0, 1]: how far each sample goes.
        center: ``c``.
        one_sided: count only gradients longer than ``c``.

    Returns:
        (B,), with a graph to the critic's weights.
    """
    share = alpha.to(real).view(-1, *[1] * (real.ndim - 1))
    return length_penalty(critic_gradient(critic, real + share * noise), center, one_sided)


class DraganPenalty(CriticPenalty):
    """Smooths a GAN's critic around the data, where sharp gradients make modes collapse (DRAGAN).

    Kodali, Abernethy, Hays, Kira (2017), On Convergence and Stability of GANs, arXiv:1705.07215.
    As one of the regularizers of Kang, Shin, Park (2022), StudioGAN: A Taxonomy and Benchmark of
    GANs for Image Synthesis, arXiv:2206.09479.

    The critic's loss becomes ``L_D + lambda E (||dD(x)/dx|| - 1)^2`` at ``x = real + alpha u``,
    with one ``alpha`` uniform in [0, 1] per sample and ``u`` uniform in ``[0, scale * std]`` for
    each number, ``std`` the standard deviation of all numbers of the batch. It is the gradient
    penalty of Wasserstein critics near the data alone, and needs no generated samples.

    Confirmed against POSTECH-CVLab/PyTorch-StudioGAN (``src/utils/losses.py``), where the points,
    ``scale`` 0.5 and the center 1 are the same (the noise is positive there as well). The default
    10 is from memory of the paper. ``center`` and ``one_sided`` are ours.

    Args:
        strength: ``lambda``.
        scale: how far points go, in standard deviations of the batch.
        center: the length that gradients are held at; 0 makes it a penalty on their size.
        one_sided: leave gradients alone that are shorter.
        interval: act in every ``interval``-th training batch, with ``interval`` times the gradient.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: under automatic optimization, and for a compiled critic.

    Note:
        Needs ``critic`` and ``real`` in the critic's call of ``self.regularize``; other calls of
        the step are left alone. Over ranks: global; the mean runs over the samples of all ranks,
        for one all-reduce of two numbers a call; each rank draws its own points, with the
        standard deviation of its own batch. Cost: one forward pass of the critic, a backward to
        its inputs, and a backward through both. Critics with BatchNorm mix samples.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import DraganPenalty
        >>> trainer = L.Trainer(callbacks=[DraganPenalty(10.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("On Convergence and Stability of GANs", "Kodali et al.", 2017, "1705.07215"),
        Paper(
            "StudioGAN: A Taxonomy and Benchmark of GANs for Image Synthesis",
            "Kang et al.",
            2022,
            "2206.09479",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = {
        "semantics": "each rank draws its own points around real samples",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(dragan_penalty)
    explanation: ClassVar[str] = "acts in the self.regularize call that hands over critic and real"

    def __init__(
        self,
        strength: float | Schedule = 10.0,
        *,
        scale: float = 0.5,
        center: float = 1.0,
        one_sided: bool = False,
        interval: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, interval=interval, name=name)
        check_range(self, "scale", scale, 0, math.inf, high_open=True, cure="DraganPenalty()")
        check_range(self, "center", center, 0, math.inf, high_open=True, cure="DraganPenalty()")
        self.scale = scale
        self.center = center
        self.one_sided = one_sided

    def values(
        self, critic: Critic, real: Tensor, fake: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """The penalty at one point near each real sample."""
        kind = {"generator": generator, "device": real.device, "dtype": real.dtype}
        alpha = torch.rand(len(real), **kind)  # type: ignore[call-overload]
        noise = torch.rand(real.shape, **kind)  # type: ignore[call-overload]
        # Of a single number there is no spread: the point is the sample itself.
        spread = real.std() if real.numel() > 1 else torch.zeros_like(real.sum())
        noise = noise * (self.scale * spread)
        return dragan_penalty(critic, real, noise, alpha, self.center, self.one_sided)
