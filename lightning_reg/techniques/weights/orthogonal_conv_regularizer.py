"""Makes convolutions orthogonal as operators on images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    ParameterSelection,
    Schedule,
    UnsupportedError,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.sharding import whole
from lightning_reg.engine.step import RunContext, full_precision
from lightning_reg.mechanisms.weight_penalty import Mode, NamedPenalty

__all__ = ["OrthogonalConvRegularizer", "orthogonal_conv_regularizer"]

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    3: F.conv_transpose1d,
    4: F.conv_transpose2d,
    5: F.conv_transpose3d,
}


def orthogonal_conv_regularizer(
    kernel: Tensor, stride: int | Sequence[int] = 1, groups: int = 1
) -> Tensor:
    """``||conv(K, K; padding P, stride S) - I_0||_F^2``, less ``M - C S^2`` where that is above 0.

    ``conv`` takes the filters for images, ``P = floor((k - 1) / S) S`` lets them overlap in every
    way that the stride allows, and ``I_0`` is the identity (M, M) at the place of full overlap and
    zero elsewhere. Zero if and only if the operator on large images with circular padding is
    orthogonal: if its rows are (``M <= C S^2``), or its columns.

    Args:
        kernel: ``K`` (M, C / groups, k, ...) of a convolution in one to three dimensions.
        stride: ``S``, one number or one a dimension.
        groups: of the convolution; each is an operator of its own, and their values are summed.

    Returns:
        A scalar, at least 0 up to rounding.
    """
    overlap, excess = _overlap(kernel, _sizes(kernel, stride), groups)
    return overlap.square().sum() - excess


class OrthogonalConvRegularizer(NamedPenalty):
    """Makes convolutions orthogonal as operators on images.

    Achour, Malgouyres, Mamalet (2021), Existence, Stability and Scalability of Orthogonal
    Convolutional Neural Networks, arXiv:2108.05623, who prove what the penalty of Wang, Chen,
    Chakraborty, Yu (2019), Orthogonal Convolutional Neural Networks, arXiv:1911.12207, does.

    ``L_orth(K) = ||conv(K, K; padding P, stride S) - I_0||_F^2 - max(M - C S^2, 0)`` for a kernel
    ``K`` (M, C, k, k), summed over layers. With circular padding and images of at least ``2 k - 1``
    places it equals ``1 / N^2`` of ``||A A^T - I||_F^2`` of the operator ``A`` that maps images of
    ``S N`` by ``S N`` to ``N`` by ``N`` (of ``||A^T A - I||_F^2`` where ``M > C S^2``): all its
    singular values become one, which neither lengthens nor shortens what goes forward or back.
    Rows of the kernel as a matrix that are orthogonal (``OrthogonalRegularizer``) do not do that.

    The formula is from memory of the paper, and its identity with the dense operator is tested.
    The code of Wang et al. (samaonline/Orthogonal-Convolutional-Neural-Networks, imagenet/utils.py,
    seen in copies) has the norm without the square, pads by 1 whatever the kernel, and keeps the
    constant; its value is the root of this one at kernels of 2. The default strength is ours.

    Args:
        strength: ``lambda``, at least 0.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all ``Conv1d``, ``Conv2d`` and ``Conv3d`` layers.
        mode: ``"gradient"`` adds the closed-form gradient once per optimizer step; ``"loss"``
            adds the penalty to the loss of every micro-batch. Equal to rounding.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, or no parameter is chosen.
        UnsupportedError: if a chosen weight is not that of a convolution without dilation.

    Note:
        Over ranks: replica; nothing is communicated. Cost per optimizer step: one convolution of
        each kernel with itself, ``M^2 C k^2 (2 k / S)^2`` multiplications, and one transposed.
        Under ``ddp_reg`` each rank computes its share of the layers, by that cost; under ``ddp``
        every rank all of them. With zero padding ("same") convolutions of more than one place are
        only near orthogonal, the nearer the larger the image. Set the optimizer's ``weight_decay``
        to 0 on these weights. In front of a BatchNorm the norm of the filters says nothing, their
        orthogonality does.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import OrthogonalConvRegularizer
        >>> trainer = L.Trainer(callbacks=[OrthogonalConvRegularizer(0.01)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks",
            "Achour et al.",
            2021,
            "2108.05623",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(orthogonal_conv_regularizer)
    explanation: ClassVar[str] = "makes convolutions orthogonal operators"
    default_selection = ParameterSelection(types=("Conv1d", "Conv2d", "Conv3d"))

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        parameters: str | ParameterSelection | None = None,
        mode: Mode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, mode=mode, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="OrthogonalConvRegularizer(0.01)")

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what is no convolution, and dilated ones."""
        super().validate(trainer, pl_module)
        for name in self.selection.select(pl_module, self):
            layer = _layer(pl_module, name)
            if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or set(layer.dilation) != {
                1
            }:
                raise UnsupportedError(
                    self,
                    f"{name} is not the weight of a convolution without dilation",
                    cure="OrthogonalConvRegularizer(parameters=ParameterSelection("
                    f'types=["Conv2d"], exclude="^{name}$"))',
                )

    def values_of(self, context: RunContext, weights: Mapping[str, nn.Parameter]) -> Tensor:
        """The penalty of each kernel."""
        values = []
        for name, weight in weights.items():
            layer: Any = _layer(context.module, name)
            kernel = full_precision(whole(weight))
            values.append(orthogonal_conv_regularizer(kernel, layer.stride, layer.groups))
        return torch.stack(values)

    def closed_form_of(
        self, context: RunContext, weights: Mapping[str, nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """The penalty and the gradient of each kernel, from its overlaps with itself."""
        values, gradients = [], []
        for name, weight in weights.items():
            layer: Any = _layer(context.module, name)
            kernel = full_precision(whole(weight.detach()))
            overlap, excess = _overlap(kernel, layer.stride, layer.groups)
            values.append(overlap.square().sum() - excess)
            gradients.append(_gradient(kernel, overlap, layer.stride, layer.groups))
        return torch.stack(values), gradients

    def cost(self, weight: Tensor) -> float:
        """Multiplications of the convolution at stride 1."""
        places = weight[0, 0].numel()
        return float(len(weight) * weight.numel() * places * 2 ** (weight.ndim - 2))


def _layer(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _sizes(kernel: Tensor, stride: int | Sequence[int]) -> tuple[int, ...]:
    if kernel.ndim not in _CONVOLVE:
        raise ArgumentError(
            "orthogonal_conv_regularizer",
            f"`kernel` must have 3 to 5 dimensions, got {tuple(kernel.shape)}",
            cure="orthogonal_conv_regularizer(conv.weight, conv.stride)",
        )
    places = kernel.ndim - 2
    return (stride,) * places if isinstance(stride, int) else tuple(stride)


def _padding(kernel: Tensor, stride: Sequence[int]) -> tuple[int, ...]:
    return tuple((k - 1) // s * s for k, s in zip(kernel.shape[2:], stride, strict=True))


def _grouped(kernel: Tensor, groups: int) -> Tensor:
    """(M, C / groups, ...) to images (M / groups, C, ...), all groups side by side."""
    return kernel.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _overlap(kernel: Tensor, stride: Sequence[int], groups: int) -> tuple[Tensor, float]:
    """``conv(K, K) - I_0`` (M / groups, M, ...), and what its square is at least."""
    convolve = _CONVOLVE[kernel.ndim]
    padding = _padding(kernel, stride)
    images = _grouped(kernel, groups)
    overlap = convolve(images, kernel, stride=tuple(stride), padding=padding, groups=groups)
    filters, channels = len(kernel) // groups, kernel.shape[1]
    centre = tuple(p // s for p, s in zip(padding, stride, strict=True))
    identity = torch.zeros_like(overlap)
    identity[(slice(None), slice(None), *centre)] = torch.eye(filters).repeat(1, groups).to(overlap)
    steps = 1
    for s in stride:
        steps *= s
    return overlap - identity, float(groups * max(filters - channels * steps, 0))


def _gradient(kernel: Tensor, overlap: Tensor, stride: Sequence[int], groups: int) -> Tensor:
    """Four times the transposed convolution: image and filter are the same."""
    images = _TRANSPOSED[kernel.ndim](
        overlap,
        kernel,
        stride=tuple(stride),
        padding=_padding(kernel, stride),
        groups=groups,
    )
    # Places that the last stride does not reach.
    missing = [k - i for k, i in zip(kernel.shape[2:], images.shape[2:], strict=True)]
    if any(missing):
        images = F.pad(images, [n for m in reversed(missing) for n in (0, m)])
    filters = images.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    return 4 * filters
