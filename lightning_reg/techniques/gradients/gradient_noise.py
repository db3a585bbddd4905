"""Adds noise to gradients, less and less of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, ParameterUpdate, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.gradient_transform import GradientTransform
from lightning_reg.mechanisms.selected_weights import EVERYTHING

__all__ = ["GradientNoise", "gradient_noise"]


def gradient_noise(
    gradients: Sequence[Tensor],
    step: int,
    generator: torch.Generator,
    eta: float = 0.01,
    gamma: float = 0.55,
) -> list[Tensor]:
    """``g + N(0, sigma_t^2)`` with ``sigma_t^2 = eta / (1 + t)^gamma``, independent in every entry.

    Args:
        gradients: tensors ``g`` of any shapes.
        step: ``t``, from 0.
        generator: of the noise, on the device of the gradients.
        eta: the variance in the first step, at least 0.
        gamma: how fast it falls, at least 0.

    Returns:
        New gradients, of the same shapes.
    """
    deviation = _deviation(step, eta, gamma)
    # One draw for all: of the same numbers whatever the number of tensors.
    count = sum(g.numel() for g in gradients)
    first = gradients[0]
    noise = torch.randn(count, generator=generator, dtype=torch.float32, device=first.device)
    parts = noise.to(first.dtype).split([g.numel() for g in gradients])
    shaped = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    return list(torch._foreach_add(list(gradients), shaped, alpha=deviation))


class GradientNoise(GradientTransform):
    """Adds noise to gradients, less and less of it.

    Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach, Martens (2015), Adding Gradient Noise
    Improves Learning for Very Deep Networks, arXiv:1511.06807.

    ``g_t <- g_t + N(0, sigma_t^2)`` with ``sigma_t^2 = eta / (1 + t)^gamma`` and ``t`` the
    optimizer steps done. Early noise takes very deep or badly initialized networks out of the
    places where they would get stuck; it fades as training goes on.

    The formula is from memory of the paper, not checked against code; no official code was looked
    for. ``gamma = 0.55`` and the choices ``eta`` in {0.01, 0.3, 1.0} are the paper's; the default
    among them is ours.

    Args:
        strength: multiplies the noise, in [0, 1].
        eta: the variance in the first step, at least 0.
        gamma: how fast it falls, at least 0; 0 keeps it.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes every parameter.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], ``eta`` or ``gamma`` is below 0, or no
            parameter is chosen.

    Note:
        Over ranks: replica; all ranks add the same noise to the reduced gradients, drawn once per
        optimizer step from a stream that a resume continues. Cost: a normal number a weight and a
        pass over gradients. The log shows ``sigma_t``. The noise is of one size for all
        parameters, and gradients are not: a small network in a sum of many batches drowns in it.
        Lightning's ``gradient_clip_val`` clips afterwards, noise and all.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import GradientNoise
        >>> trainer = L.Trainer(callbacks=[GradientNoise(eta=0.01)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Adding Gradient Noise Improves Learning for Very Deep Networks",
            "Neelakantan et al.",
            2015,
            "1511.06807",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(gradient_noise)
    explanation: ClassVar[str] = "adds fading noise to gradients"
    default_selection = EVERYTHING

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        eta: float = 0.01,
        gamma: float = 0.55,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        for letter, value in (("eta", eta), ("gamma", gamma)):
            cure = f"GradientNoise({letter}=0.5)"
            check_range(self, letter, value, 0, math.inf, high_open=True, cure=cure)
        self.eta = eta
        self.gamma = gamma
        self._update: ParameterUpdate | None = None

    def edit_gradients(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 7."""
        self._update = update
        try:
            return super().edit_gradients(update)
        finally:
            self._update = None

    def transform(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Noisy gradients, and the noise's deviation."""
        assert self._update is not None
        step, generator = self._update.global_step, self._update.rng(self)
        noisy = gradient_noise(gradients, step, generator, self.eta, self.gamma)
        return noisy, gradients[0].new_tensor(_deviation(step, self.eta, self.gamma))


def _deviation(step: int, eta: float, gamma: float) -> float:
    return math.sqrt(eta / (1 + step) ** gamma)
