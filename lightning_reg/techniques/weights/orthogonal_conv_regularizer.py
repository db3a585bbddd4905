"""Makes convolutions orthogonal as operators on images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
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
    strides = _strides(kernel, stride)
    parts = _overlaps(kernel, strides, groups)
    total = torch.stack([weight * overlap.square().sum() for weight, overlap, *_ in parts]).sum()
    value: Tensor = total - _excess(kernel, strides, groups)
    return value


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
        Over ranks: replica; nothing is communicated. Cost per optimizer step: for each of the
        ``(2 floor((k - 1) / S) + 1)^2 / 2`` pairs of shifts three matrix products of up to
        ``M^2 C k^2`` multiplications; in wide layers as much as a training step. Under ``ddp_reg``
        each rank computes its share of the layers, by that cost; under ``ddp`` every rank all of
        them. With zero padding ("same") convolutions of more than one place are only near
        orthogonal, the nearer the larger the image. Set the optimizer's ``weight_decay`` to 0 on
        these weights. In front of a BatchNorm the norm of the filters says nothing, their
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
            value, gradient = _value_and_gradient(kernel, layer.stride, layer.groups)
            values.append(value)
            gradients.append(gradient)
        return torch.stack(values), gradients

    def cost(self, weight: Tensor) -> float:
        """Multiplications of all products at stride 1."""
        overlaps = math.prod(k * k for k in weight.shape[2:])
        return float(len(weight) ** 2 * weight.shape[1] * overlaps)


def _layer(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _strides(kernel: Tensor, stride: int | Sequence[int]) -> tuple[int, ...]:
    if not 3 <= kernel.ndim <= 5:
        raise ArgumentError(
            "orthogonal_conv_regularizer",
            f"`kernel` must have 3 to 5 dimensions, got {tuple(kernel.shape)}",
            cure="orthogonal_conv_regularizer(conv.weight, conv.stride)",
        )
    return (stride,) * (kernel.ndim - 2) if isinstance(stride, int) else tuple(stride)


def _excess(kernel: Tensor, stride: Sequence[int], groups: int) -> float:
    """What the sum of squares is at least, where there are more filters than can be orthogonal."""
    filters, inputs = len(kernel) // groups, kernel.shape[1] * math.prod(stride)
    return float(groups * max(filters - inputs, 0))


def _overlaps(
    kernel: Tensor, stride: Sequence[int], groups: int
) -> Iterator[tuple[int, Tensor, tuple[slice, ...], tuple[slice, ...]]]:
    """``conv(K, K) - I_0`` shift by shift: how often it counts, the matrices, and what overlaps.

    Shifts come in pairs with transposed matrices, of which one is computed, and only where two
    filters overlap: a fifth of the work of a padded convolution at kernels of three by three.

    Yields:
        1 or 2, (groups, M / groups, M / groups), and the places of the shifted and of the other
        filter.
    """
    reaches = [
        range(-((k - 1) // s) * s, k, s) for k, s in zip(kernel.shape[2:], stride, strict=True)
    ]
    for shift in product(*reaches):
        if shift < (0,) * len(shift):
            continue
        shifted = tuple(
            slice(max(o, 0), min(k, k + o)) for o, k in zip(shift, kernel.shape[2:], strict=True)
        )
        other = tuple(slice(p.start - o, p.stop - o) for o, p in zip(shift, shifted, strict=True))
        matrices = _rows(kernel, shifted, groups) @ _rows(kernel, other, groups).mT
        if not any(shift):
            filters = matrices.shape[-1]
            matrices = matrices - torch.eye(filters, dtype=kernel.dtype, device=kernel.device)
        yield 1 + any(shift), matrices, shifted, other


def _rows(kernel: Tensor, places: tuple[slice, ...], groups: int) -> Tensor:
    """(groups, M / groups, C / groups * places)."""
    rows: Tensor = _at(kernel, places).flatten(1).unflatten(0, (groups, -1))
    return rows


def _at(kernel: Tensor, places: tuple[slice, ...]) -> Tensor:
    everywhere = (slice(None), slice(None), *places)
    return kernel[everywhere]


def _value_and_gradient(
    kernel: Tensor, stride: Sequence[int], groups: int
) -> tuple[Tensor, Tensor]:
    value = kernel.new_tensor(-_excess(kernel, stride, groups))
    gradient = torch.zeros_like(kernel)
    for weight, overlap, shifted, other in _overlaps(kernel, stride, groups):
        value = value + weight * overlap.square().sum()
        for matrices, places, factor in ((overlap, shifted, other), (overlap.mT, other, shifted)):
            pull = 2 * weight * matrices @ _rows(kernel, factor, groups)
            target = _at(gradient, places)
            target += pull.flatten(0, 1).view_as(target)
    return value, gradient
