"""Holds a Wasserstein critic's gradient at length one between real and generated samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.critic_penalty import (
    Critic,
    CriticPenalty,
    critic_gradient,
    length_penalty,
)

__all__ = ["WassersteinGradientPenalty", "wasserstein_gradient_penalty"]


def wasserstein_gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    epsilon: Tensor,
    center: float = 1.0,
    one_sided: bool = False,
) -> Tensor:
    """``(||dD(x)/dx|| - c)^2`` at ``x = epsilon * real + (1 - epsilon) * fake``.

    Args:
        critic: ``D``, takes (B, ...) and gives scores (B, ...), summed per sample.
        real: (B, ...).
        fake: (B, ...); nothing flows back to it.
        epsilon: (B,), in [0, 1]: one number per pair.
        center: ``c``.
        one_sided: count only gradients longer than ``c``.

    Returns:
        (B,), with a graph to the critic's weights. A gradient of exactly 0 passes none on.
    """
    share = epsilon.to(real).view(-1, *[1] * (real.ndim - 1))
    gradient = critic_gradient(critic, share * real + (1 - share) * fake)
    return length_penalty(gradient, center, one_sided)


class WassersteinGradientPenalty(CriticPenalty):
    """Enforces the Lipschitz constraint of a Wasserstein critic softly (WGAN-GP).

    Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville (2017), Improved Training of Wasserstein GANs,
    arXiv:1704.00028. As one of the regularizers of Kang, Shin, Park (2022), StudioGAN: A Taxonomy
    and Benchmark of GANs for Image Synthesis, arXiv:2206.09479.

    The critic's loss becomes ``E D(fake) - E D(real) + lambda E (||dD(x)/dx|| - 1)^2`` at points
    ``x`` drawn uniformly on the lines between real and generated samples, one number epsilon per
    pair. The penalty has two sides: gradients below 1 are penalized too. Values are those of
    POSTECH-CVLab/PyTorch-StudioGAN (``src/utils/losses.py``); the default 10 is the paper's and
    that repository's for this loss. ``one_sided=True`` penalizes gradients above 1 alone, as the
    Lipschitz constraint asks (Petzka, Fischer, Lukovnicov 2018, On the regularization of
    Wasserstein GANs, arXiv:1709.08894); ``center=0`` is the zero-centered penalty (Thanh-Tung,
    Tran, Venkatesh 2019, Improving Generalization and Stability of Generative Adversarial Networks,
    arXiv:1902.03984). Both are from memory of those papers.

    Args:
        strength: ``lambda``.
        center: the length that gradients are held at.
        one_sided: leave gradients alone that are shorter.
        interval: act in every ``interval``-th training batch, with ``interval`` times the
            gradient; the paper acts in all.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``interval`` is not a whole number from 1, or ``center`` below 0.
        RegularizationError: in the first step, if real and generated samples differ in shape.
        UnsupportedError: under automatic optimization, and for a compiled critic.

    Note:
        Needs ``critic``, ``real`` and ``fake`` in the critic's call of ``self.regularize``; other
        calls of the step are left alone.

        Over ranks: global; the mean runs over the samples of all ranks, for one all-reduce of two
        numbers a call, and each rank draws its own epsilon. Cost: one forward pass of the critic,
        a backward to its inputs, and a backward through both. Critics with BatchNorm mix samples,
        which the constraint per sample does not allow for: the paper uses layer normalization.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import WassersteinGradientPenalty
        >>> trainer = L.Trainer(callbacks=[WassersteinGradientPenalty(10.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "StudioGAN: A Taxonomy and Benchmark of GANs for Image Synthesis",
            "Kang et al.",
            2022,
            "2206.09479",
        ),
        Paper("Improved Training of Wasserstein GANs", "Gulrajani et al.", 2017, "1704.00028"),
        Paper("On the regularization of Wasserstein GANs", "Petzka et al.", 2018, "1709.08894"),
        Paper(
            "Improving Generalization and Stability of Generative Adversarial Networks",
            "Thanh-Tung et al.",
            2019,
            "1902.03984",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("critic", "real", "fake")
    exemptions: ClassVar[dict[str, str]] = {
        "semantics": "each rank draws its own points between real and generated samples",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(wasserstein_gradient_penalty)
    explanation: ClassVar[str] = (
        "acts in the self.regularize call that hands over critic, real and fake"
    )

    def __init__(
        self,
        strength: float | Schedule = 10.0,
        *,
        center: float = 1.0,
        one_sided: bool = False,
        interval: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, interval=interval, name=name)
        cure = "WassersteinGradientPenalty(center=1.0)"
        check_range(self, "center", center, 0, float("inf"), high_open=True, cure=cure)
        self.center = center
        self.one_sided = one_sided

    def values(
        self, critic: Critic, real: Tensor, fake: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """The penalty of each pair."""
        assert fake is not None
        if real.shape != fake.shape:
            raise RegularizationError(
                self,
                "needs as many generated as real samples, of one shape, got "
                f"{tuple(real.shape)} and {tuple(fake.shape)}",
                cure="self.regularize(loss, critic=self.critic, real=real, fake=fake[:len(real)])",
            )
        epsilon = torch.rand(len(real), generator=generator, device=real.device)
        return wasserstein_gradient_penalty(
            critic, real, fake, epsilon, self.center, self.one_sided
        )
