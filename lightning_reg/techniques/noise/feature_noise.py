"""Adds Gaussian noise to what layers return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.forward_noise import OWN_NOISE, ActivationNoise

__all__ = ["FeatureNoise", "feature_noise"]

Kind = Literal["additive", "multiplicative"]
_KINDS = ("additive", "multiplicative")


def feature_noise(features: Tensor, noise: Tensor, sigma: float, kind: Kind = "additive") -> Tensor:
    """``h + sigma eps``, or ``h (1 + sigma eps)``; the mean over ``eps`` is ``h`` in both.

    Args:
        features: ``h``, of any shape.
        noise: ``eps`` of mean 0 and variance 1, of the same shape.
        sigma: the standard deviation, of the noise or relative to ``h``.
        kind: ``"additive"`` or ``"multiplicative"``.

    Returns:
        Of the shape of ``features``.
    """
    if kind == "additive":
        return features + sigma * noise
    return features * (1 + sigma * noise)


class FeatureNoise(ActivationNoise):
    """Trains with Gaussian noise on the output of layers.

    ``kind="multiplicative"`` is the Gaussian dropout of Srivastava, Hinton, Krizhevsky, Sutskever,
    Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural Networks from Overfitting,
    JMLR 15, section 10: ``h (1 + sigma eps)``, which at ``sigma^2 = p / (1 - p)`` has the mean and
    the variance of dropout with rate ``p``. ``"additive"`` is ``h + sigma eps``, which to second
    order adds ``sigma^2 / 2`` times the trace of the loss's Hessian by ``h`` (Bishop, 1995,
    Training with Noise is Equivalent to Tikhonov Regularization). The default ``sigma`` is ours.

    Args:
        sigma: the standard deviation, at least 0, or a Schedule; 0 turns the technique off.
        layers: names of submodules whose output, a tensor, is changed.
        kind: ``"additive"`` or ``"multiplicative"``.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if ``sigma`` is below 0, ``kind`` is none of the two, or a layer is not
            there.

    Note:
        In training steps only; a second pass (SAM) sees the same noise. Over ranks: local, every
        rank draws for its own samples. Cost: one draw of normal numbers and a multiplication for
        each output.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import FeatureNoise
        >>> trainer = L.Trainer(callbacks=[FeatureNoise(0.1, layers="encoder")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
            "Srivastava et al.",
            2014,
            None,
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = OWN_NOISE
    function: ClassVar[Callable[..., Any] | None] = staticmethod(feature_noise)
    explanation: ClassVar[str] = "adds Gaussian noise to the output of layers"

    def __init__(
        self,
        sigma: float | Schedule = 0.1,
        *,
        layers: str | Sequence[str],
        kind: Kind = "additive",
        name: str | None = None,
    ) -> None:
        super().__init__(sigma, layers=layers, name=name)
        cure = 'FeatureNoise(0.1, layers="encoder", kind="additive")'
        if not isinstance(sigma, Schedule):
            check_range(self, "sigma", sigma, 0, cure=cure)
        if kind not in _KINDS:
            raise ArgumentError(
                self, f"`kind` must be one of {', '.join(_KINDS)}, got {kind!r}", cure=cure
            )
        self.kind = kind

    def noisy_output(self, output: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The noised output."""
        noise = torch.randn(
            output.shape, generator=generator, device=output.device, dtype=output.dtype
        )
        return feature_noise(output, noise, strength, self.kind)
