"""Divides each weight by its largest singular value, which bounds what a layer can stretch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, ParameterSelection
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.random import stream
from lightning_reg.engine.update import ParameterUpdate
from lightning_reg.mechanisms.reparameterization import Reparameterization

__all__ = ["SpectralNormalization", "spectral_normalization"]

_WARM_UP = 15


def spectral_normalization(weight: Tensor, u: Tensor, v: Tensor, bound: float = 1.0) -> Tensor:
    """``c W / sigma`` with ``sigma = u^T W v``, the largest singular value if ``u, v`` are its own.

    Args:
        weight: ``W`` (n, ...), taken as a matrix (n, m).
        u: (n,), of length one; a constant.
        v: (m,), of length one; a constant.
        bound: ``c``, the largest singular value of the result.

    Returns:
        The shape of the weight. Its gradient passes through ``sigma``.
    """
    sigma = torch.dot(u.detach(), weight.flatten(1) @ v.detach())
    return weight * (bound / sigma)


class SpectralNormalization(Reparameterization):
    """Divides each weight by its largest singular value, so that every layer is 1-Lipschitz.

    Miyato, Kataoka, Koyama, Yoshida (2018), Spectral Normalization for Generative Adversarial
    Networks, arXiv:1802.05957. As one of the regularizers of Kang, Shin, Park (2022), StudioGAN,
    arXiv:2206.09479.

    A layer computes with ``c W / sigma(W)``; the optimizer moves ``W``. With activations that do
    not stretch either, a critic of such layers is Lipschitz with the product of all ``c``.
    ``sigma = u^T W v`` comes from power iteration, ``v = W^T u / |.|``, ``u = W v / |.|``, which
    goes on from step to step; the gradient passes through ``sigma`` with ``u`` and ``v`` held
    fixed. Values and gradients are those of ``torch.nn.utils.parametrizations.spectral_norm``,
    which follows the paper. What this adds: the layers are chosen by name or type, the start of
    the iteration does not touch the global generator, the computation is in float32 under mixed
    precision, and after the fit (and in checkpoints) the module has plain, normalized weights.

    Convolutions are taken as matrices (outputs, the rest), as in the paper: a bound on that matrix
    is not the norm of the convolution, which can be larger, up to the square root of the kernel's
    size.

    Args:
        bound: ``c``, the largest singular value.
        iterations: power iterations after each optimizer step. The start gets 15.
        parameters: a regular expression on parameter names (``"critic"``), or a
            ParameterSelection; ``None`` takes the weights of all linear and convolutional layers.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``bound`` is not above 0, ``iterations`` below 1, or no parameter is
            chosen.
        UnsupportedError: if a layer is parametrized already.

    Note:
        Over ranks: replica; the iteration starts alike on all ranks and reads weights alone, so
        its vectors stay equal without communication. They are part of checkpoints, and move once
        an optimizer step (once a batch under manual optimization), where torch's move with every
        forward pass. Cost: two products of a matrix and a vector per layer and step, a third and
        one pass over the weight per forward pass.

        Weight decay acts on ``W``, where it changes only the effective learning rate. Do not
        combine it with BatchNorm right behind the layer, which undoes any scale. It costs capacity
        where one direction has to be much stronger than the others.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SpectralNormalization
        >>> callback = SpectralNormalization(parameters="critic")
        >>> trainer = L.Trainer(callbacks=[callback], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Spectral Normalization for Generative Adversarial Networks",
            "Miyato et al.",
            2018,
            "1802.05957",
        ),
        Paper(
            "StudioGAN: A Taxonomy and Benchmark of GANs for Image Synthesis",
            "Kang et al.",
            2022,
            "2206.09479",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = {
        "neutral": "weights that are a function of others have no setting that does nothing; "
        "leave the callback out",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(spectral_normalization)
    explanation: ClassVar[str] = "computes with W / sigma(W) and trains W"

    def __init__(
        self,
        bound: float = 1.0,
        *,
        iterations: int = 1,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(parameters=parameters, name=name)
        infinite = float("inf")
        cure = "SpectralNormalization(bound=1.0)"
        check_range(self, "bound", bound, 0, infinite, low_open=True, high_open=True, cure=cure)
        if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
            problem = f"`iterations` must be a whole number from 1, got {iterations!r}"
            raise ArgumentError(self, problem, cure="SpectralNormalization(iterations=1)")
        self.bound = bound
        self.iterations = iterations
        self._transposed: set[str] = set()

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note which weights have their outputs on the second dimension."""
        super().validate(trainer, pl_module)
        chosen = self.selection.select_modules(pl_module, self)
        transposed = nn.modules.conv._ConvTransposeNd
        self._transposed = {n for n, (layer, _) in chosen.items() if isinstance(layer, transposed)}

    def parametrization(self, name: str, weight: Tensor) -> nn.Module:
        """The division of one layer by its norm."""
        dim = 1 if name in self._transposed else 0
        return _Normalized(weight, dim, self.bound, name)

    def project(self, update: ParameterUpdate) -> None:
        """Phase 8: follow the new weights."""
        for bound in self._bound:
            layer: Any = bound.layer
            part = layer.parametrizations[bound.attribute]
            if isinstance(part[0], _Normalized):
                part[0].iterate(part.original, self.iterations)


class _Normalized(nn.Module):
    """``W`` to ``c W / sigma``, with the vectors of its power iteration."""

    def __init__(self, weight: Tensor, dim: int, bound: float, name: str) -> None:
        super().__init__()
        self.dim, self.bound = dim, bound
        matrix = self._matrix(weight)
        generator = stream("cpu", 0, "spectral normalization", name)
        for vector, size in zip("uv", matrix.shape, strict=True):
            start = torch.randn(size, generator=generator, dtype=torch.float64)
            self.register_buffer(vector, F.normalize(start, dim=0).to(matrix))
        self.iterate(weight, _WARM_UP)

    def forward(self, weight: Tensor) -> Tensor:
        """The normalized weight."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = self._matrix(weight)
            u, v = self.get_buffer("u"), self.get_buffer("v")
            result = spectral_normalization(matrix, u, v, self.bound).to(weight.dtype)
        shape = weight.transpose(0, self.dim).shape
        return result.reshape(shape).transpose(0, self.dim)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Any multiple of the weight gives the same one."""
        return weight

    @torch.no_grad()
    def iterate(self, weight: Tensor, count: int) -> None:
        """Turn the vectors towards those of the largest singular value."""
        u, v = self.get_buffer("u"), self.get_buffer("v")
        matrix = self._matrix(weight).to(u.dtype)
        for _ in range(count):
            v.copy_(F.normalize(matrix.T @ u, dim=0))
            u.copy_(F.normalize(matrix @ v, dim=0))

    def _matrix(self, weight: Tensor) -> Tensor:
        rows = weight.transpose(0, self.dim).flatten(1)
        half = rows.dtype in (torch.float16, torch.bfloat16)
        return rows.float() if half else rows
