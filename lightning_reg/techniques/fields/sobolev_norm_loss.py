"""Weights the frequencies of a residual, so that noise counts less or edges more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.grid_penalty import GridPenalty

__all__ = ["SobolevNormLoss", "sobolev_norm_loss"]

Frequencies = Literal["integer", "physical"]
_FREQUENCIES = ("integer", "physical")


def sobolev_norm_loss(
    residual: Tensor, s: float, lengths: Sequence[float] | None = None, grid_dims: int = 1
) -> Tensor:
    """``||r||_{H^s}^2 = sum_k (1 + |k|^2)^s |r_k|^2`` of each sample, summed over channels.

    ``r_k = FFT(r)_k / N`` with ``N`` grid points, so that ``s = 0`` is the mean square over the
    grid (Parseval).

    Args:
        residual: ``r`` (B, ..., grid), real.
        s: the order, of any sign.
        lengths: ``L`` of each grid dimension, for frequencies ``2 pi k / L``; ``None`` takes the
            whole numbers ``k``, as on a box of length ``2 pi``.
        grid_dims: how many of the last dimensions are the grid.

    Returns:
        (B,), in squared units of the residual.
    """
    grid = residual.shape[-grid_dims:]
    dims = tuple(range(-grid_dims, 0))
    spectrum = torch.fft.rfftn(residual, dim=dims, norm="forward")
    energy = spectrum.real.square() + spectrum.imag.square()
    weights = _weights(grid, s, lengths, residual)
    total: Tensor = (energy * weights).flatten(1).sum(1)
    return total


class SobolevNormLoss(GridPenalty):
    """Weights the frequencies of a residual: less of the high ones learns less noise.

    Zhu, Hu, Lou, Yang (2021), Implicit Regularization Effects of the Sobolev Norms in Image
    Processing, arXiv:2109.06255.

    Adds ``||v - u||_{H^s}^2 = sum_k (1 + |k|^2)^s |(v - u)_k|^2`` of prediction ``v`` and target
    ``u`` to the loss. With ``s < 0`` high frequencies, where noise is, count little and are
    fitted late; with ``s > 0`` edges count more; ``s = 0`` is the mean squared error. It is meant
    in place of a squared error: let ``training_step`` return ``prediction.sum() * 0``, or call
    ``lightning_reg.functional.sobolev_norm_loss`` in it. On top of one, the frequency ``k`` has the
    weight ``1 + strength (1 + |k|^2)^s``.

    The formula is from the abstract and the definition of the norm; not checked against code, of
    which none was found. The default order is ours.

    Args:
        strength: the multiplier.
        s: the order.
        grid_dims: how many of the last dimensions are the grid; 2 for images.
        frequencies: ``"integer"``: ``k`` counts waves on the grid, so ``s`` acts from the first
            wave on whatever the size; ``"physical"``: ``2 pi k / (n h)`` with ``n`` points of
            spacing ``h``.
        spacing: ``h``: a number, or one per grid dimension; for physical frequencies.
        signals: where the prediction (``logits``) and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if shapes differ or there is no such grid.

    Note:
        Over ranks: global; the mean runs over the samples of all ranks. Cost: one real FFT of the
        residual and one back, in float32. The grid is taken as periodic: a residual that does not
        close at the border leaks into high frequencies; pad or window such images.

        A negative ``s`` leaves fine detail unlearned along with the noise.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SobolevNormLoss
        >>> trainer = L.Trainer(callbacks=[SobolevNormLoss(s=-1.0, grid_dims=2)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Implicit Regularization Effects of the Sobolev Norms in Image Processing",
            "Zhu et al.",
            2021,
            "2109.06255",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(sobolev_norm_loss)
    explanation: ClassVar[str] = "adds the residual's energy, weighted by frequency"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        s: float = -1.0,
        grid_dims: int = 1,
        frequencies: Frequencies = "integer",
        spacing: float | Sequence[float] = 1.0,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, grid_dims=grid_dims, spacing=spacing, signals=signals, name=name)
        infinite = float("inf")
        cure = "SobolevNormLoss(s=-1.0)"
        check_range(self, "s", s, -infinite, infinite, low_open=True, high_open=True, cure=cure)
        if frequencies not in _FREQUENCIES:
            problem = f"`frequencies` must be one of {', '.join(_FREQUENCIES)}, got {frequencies!r}"
            raise ArgumentError(self, problem, cure='SobolevNormLoss(frequencies="integer")')
        self.s = s
        self.frequencies = frequencies

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The squared norm of each sample's residual."""
        lengths = None
        if self.frequencies == "physical":
            grid = prediction.shape[-self.grid_dims :]
            lengths = [n * h for n, h in zip(grid, self.spacing, strict=True)]
        return sobolev_norm_loss(prediction - target, self.s, lengths, self.grid_dims)


def _weights(
    grid: Sequence[int], s: float, lengths: Sequence[float] | None, like: Tensor
) -> Tensor:
    """``(1 + |k|^2)^s``, twice where half a spectrum stands for both signs of ``k``."""
    kind: Any = {"device": like.device, "dtype": like.dtype}
    squared = torch.zeros((), **kind)
    for dim, points in enumerate(grid):
        half = dim == len(grid) - 1
        frequency = torch.fft.rfftfreq if half else torch.fft.fftfreq
        k = frequency(points, 1 / points, **kind)
        if lengths is not None:
            k = k * (2 * math.pi / lengths[dim])
        squared = squared.unsqueeze(-1) + k.square()
    count = torch.full((grid[-1] // 2 + 1,), 2.0, **kind)
    count[0] = 1.0
    if grid[-1] % 2 == 0:
        count[-1] = 1.0
    weights: Tensor = count * (1 + squared).pow(s)
    return weights
