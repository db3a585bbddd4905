"""Adds Gaussian noise to weights while a step runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.forward_noise import ForwardNoise

__all__ = ["WeightNoise", "weight_noise"]

Scale = Literal["absolute", "rms"]
_SCALES = ("absolute", "rms")


def weight_noise(weight: Tensor, noise: Tensor, sigma: float, scale: Scale = "absolute") -> Tensor:
    """``W + sigma s eps`` with ``s`` 1, or the root mean square of ``W`` without a gradient.

    Args:
        weight: ``W``.
        noise: ``eps`` of mean 0 and variance 1, of the same shape.
        sigma: the standard deviation, in the unit of weights or relative to their size.
        scale: ``"absolute"`` or ``"rms"``.

    Returns:
        Of the shape of ``weight``; its gradient is passed on as it is.
    """
    if scale == "absolute":
        return weight + sigma * noise
    return weight + sigma * weight.detach().square().mean().sqrt() * noise


class WeightNoise(ForwardNoise):
    """Trains with Gaussian noise on the weights, fresh in each optimizer step.

    Graves (2011), Practical Variational Inference for Neural Networks: ``W + sigma eps`` with a
    fixed ``sigma`` is its adaptive-free form, the classic weight noise; the gradient at the noised
    weights goes to the weights. To second order it adds ``sigma^2 / 2`` times the trace of the
    loss's Hessian, so it prefers flat minima. ``scale="rms"`` makes ``sigma`` relative to each
    weight tensor's size, for networks whose layers have different scales. Defaults are ours.

    Args:
        sigma: the standard deviation, at least 0, or a Schedule; 0 turns the technique off.
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            default: the weights of linear and convolutional layers.
        scale: ``"absolute"`` or ``"rms"``.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if ``sigma`` is below 0, ``scale`` is none of the two, or before training,
            if nothing is selected.

    Note:
        Over ranks: replica; one draw per optimizer step, the same on all ranks and in all
        micro-batches, so that several of either equal one joint batch. A second pass (SAM) sees
        the same noise. Validation sees the weights. Cost: a draw and a sum over the weights per
        micro-batch.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import WeightNoise
        >>> trainer = L.Trainer(callbacks=[WeightNoise(0.01)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Practical Variational Inference for Neural Networks", "Graves", 2011, None),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(weight_noise)
    explanation: ClassVar[str] = (
        "your step runs with Gaussian noise on the weights; one draw per optimizer step, the same "
        "on all ranks"
    )

    def __init__(
        self,
        sigma: float | Schedule = 0.01,
        *,
        parameters: str | ParameterSelection | None = None,
        scale: Scale = "absolute",
        name: str | None = None,
    ) -> None:
        super().__init__(sigma, parameters=parameters, name=name)
        cure = 'WeightNoise(0.01, scale="absolute")'
        if not isinstance(sigma, Schedule):
            check_range(self, "sigma", sigma, 0, cure=cure)
        if scale not in _SCALES:
            raise ArgumentError(
                self, f"`scale` must be one of {', '.join(_SCALES)}, got {scale!r}", cure=cure
            )
        self.scale = scale

    def noisy_weights(
        self, weights: Mapping[str, Tensor], strength: float, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """The noised weights; one draw for all of them."""
        sizes = [weight.numel() for weight in weights.values()]
        device = next(iter(weights.values())).device
        noise = torch.randn(sum(sizes), generator=generator, device=device).split(sizes)
        return {
            name: weight_noise(weight, eps.view(weight.shape).to(weight), strength, self.scale)
            for (name, weight), eps in zip(weights.items(), noise, strict=True)
        }
