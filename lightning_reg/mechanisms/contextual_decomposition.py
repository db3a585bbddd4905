"""Splits what a chain of layers computes into the part of some inputs and the part of the rest.

:func:`decompose` carries a pair (relevant, irrelevant) through layers, one rule for each kind:

- ``Linear``, ``Conv``, ``BatchNorm`` with its running statistics: each part through the weights;
  the bias goes to both in the ratio of their sizes;
- ``ReLU`` and other activations of one number: the relevant part alone, the rest is the
  difference to the whole;
- ``MaxPool``: both follow the maximum of the whole; average pooling, flattening, and dropout (taken
  as the identity) are linear;
- ``Embedding`` as the first layer, ``LSTM`` (one layer, one direction): gates split by the average
  over both orders of adding the parts; what comes out is the hidden state after the last step.

The parts always add up to what the layers compute in evaluation mode. A chain is flat:
``nn.Sequential`` may contain others; a branch (a residual block) has no rule and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.engine.errors import UnsupportedError

Parts = tuple[Tensor, Tensor]
_TINY = 1e-19
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus)
_LINEAR = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.Flatten)
_IDENTITY = (nn.Identity, nn.modules.dropout._DropoutNd)
_POOLS: dict[type[nn.Module], Any] = {
    nn.MaxPool1d: F.max_pool1d,
    nn.MaxPool2d: F.max_pool2d,
    nn.MaxPool3d: F.max_pool3d,
}
_NORM = nn.modules.batchnorm._BatchNorm


def flat_layers(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers of a chain in order, ``Sequential`` containers opened."""
    layers: list[nn.Module] = []
    for module in modules:
        layers += flat_layers(list(module)) if isinstance(module, nn.Sequential) else [module]
    return layers


def check_layers(owner: object, layers: Sequence[nn.Module], cure: str) -> None:
    """Raise :class:`UnsupportedError` for a layer without a rule."""
    for position, layer in enumerate(layers):
        problem = _problem(layer, position)
        if problem is not None:
            raise UnsupportedError(owner, problem, cure=cure)


def decompose(layers: Sequence[nn.Module], inputs: Tensor, mask: Tensor) -> Parts:
    """The parts of the output that belong to the inputs inside and outside of a mask.

    Args:
        layers: a flat chain that passed :func:`check_layers`.
        inputs: (B, ...); (B, T) of indices where the first layer is an ``Embedding``.
        mask: in [0, 1], broadcasts against the inputs.

    Returns:
        Two tensors of the chain's output, with a graph to the weights.
    """
    first, *rest = layers
    if isinstance(first, nn.Embedding):
        vectors = F.embedding(inputs, first.weight, first.padding_idx)
        share = mask.unsqueeze(-1).to(vectors)
        parts = share * vectors, (1 - share) * vectors
    else:
        parts, rest = (mask * inputs, (1 - mask) * inputs), list(layers)
        share = mask
    for layer in rest:
        parts = _through(layer, parts, share)
    return parts


def _problem(layer: nn.Module, position: int) -> str | None:
    name = type(layer).__name__
    if isinstance(layer, nn.Embedding):
        return None if position == 0 else "has a rule for an Embedding as the first layer only"
    if isinstance(layer, nn.LSTM):
        plain = layer.num_layers == 1 and not layer.bidirectional and layer.proj_size == 0
        return None if plain else "has a rule for an LSTM of one layer and one direction only"
    if isinstance(layer, _NORM):
        kept = layer.running_mean is not None
        return None if kept else f"has a rule for {name} with running statistics only"
    if isinstance(layer, (nn.modules.conv._ConvTransposeNd,)):
        return f"has no rule for {name}"
    known = (nn.Linear, nn.modules.conv._ConvNd, *_ACTIVATIONS, *_LINEAR, *_IDENTITY, *_POOLS)
    if isinstance(layer, known):
        return None
    return (
        f"splits what layers compute and has no rule for {name}; it knows Linear, Conv, BatchNorm, "
        "activations, pooling, Flatten, Dropout, Embedding and LSTM, one behind the other"
    )


def _through(layer: Any, parts: Parts, share: Tensor) -> Parts:
    if isinstance(layer, nn.LSTM):
        return _lstm(layer, parts, share)
    if isinstance(layer, nn.Linear):
        return _with_bias(parts, lambda x: F.linear(x, layer.weight), layer.bias, -1)
    if isinstance(layer, nn.modules.conv._ConvNd):
        weight = layer.weight
        return _with_bias(parts, lambda x: layer._conv_forward(x, weight, None), layer.bias, 1)
    if isinstance(layer, _NORM):
        return _batch_norm(layer, parts)
    if isinstance(layer, _IDENTITY):
        return parts
    if isinstance(layer, tuple(_POOLS)):
        return _max_pool(layer, parts)
    relevant, irrelevant = parts
    if isinstance(layer, _LINEAR):
        return layer(relevant), layer(irrelevant)
    activation = _activation(layer)
    alone = activation(relevant)
    return alone, activation(relevant + irrelevant) - alone


def _activation(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    # A layer that writes into its input would change the parts.
    return F.relu if isinstance(layer, nn.ReLU) else lambda x: layer(x.clone())


def _with_bias(
    parts: Parts, apply: Callable[[Tensor], Tensor], bias: Tensor | None, dim: int
) -> Parts:
    relevant, irrelevant = apply(parts[0]), apply(parts[1])
    if bias is None:
        return relevant, irrelevant
    shape = [1] * relevant.ndim
    shape[dim] = -1
    return _share_bias(relevant, irrelevant, bias.view(shape))


def _share_bias(relevant: Tensor, irrelevant: Tensor, bias: Tensor) -> Parts:
    """Each part gets of the bias what it has of ``|relevant| + |irrelevant|``."""
    sizes = relevant.abs(), irrelevant.abs()
    total = sizes[0] + sizes[1] + _TINY
    return relevant + sizes[0] / total * bias, irrelevant + sizes[1] / total * bias


def _batch_norm(layer: Any, parts: Parts) -> Parts:
    mean, variance = layer.running_mean, layer.running_var
    scale = (variance + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight
    bias = -mean * scale if layer.bias is None else layer.bias - mean * scale
    shape = [1] * parts[0].ndim
    shape[1] = -1
    column = scale.view(shape)
    return _share_bias(parts[0] * column, parts[1] * column, bias.view(shape))


def _max_pool(layer: Any, parts: Parts) -> Parts:
    pool = next(function for kind, function in _POOLS.items() if isinstance(layer, kind))
    pooled, where = pool(
        parts[0] + parts[1],
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        ceil_mode=layer.ceil_mode,
        return_indices=True,
    )
    flat = where.flatten(2)
    relevant, irrelevant = (p.flatten(2).gather(2, flat).view_as(pooled) for p in parts)
    return relevant, irrelevant


def _lstm(layer: Any, parts: Parts, share: Tensor) -> Parts:
    """The parts of the hidden state after the last step."""
    batch_first = layer.batch_first
    steps = list(zip(*(p.unbind(1 if batch_first else 0) for p in parts), strict=True))
    shares = share.unbind(1 if batch_first else 0)
    bias = torch.zeros_like(layer.weight_ih_l0[:, 0])
    if layer.bias:
        bias = layer.bias_ih_l0 + layer.bias_hh_l0
    size = (len(steps[0][0]), layer.hidden_size)
    hidden = steps[0][0].new_zeros(size), steps[0][0].new_zeros(size)
    cell = hidden
    for (relevant, irrelevant), weight in zip(steps, shares, strict=True):
        gates = [
            F.linear(x, layer.weight_ih_l0) + F.linear(h, layer.weight_hh_l0)
            for x, h in zip((relevant, irrelevant), hidden, strict=True)
        ]
        cell, hidden = _lstm_step(gates[0], gates[1], bias, cell, weight)
    return hidden


def _lstm_step(
    relevant: Tensor, irrelevant: Tensor, bias: Tensor, cell: Parts, share: Tensor
) -> tuple[Parts, Parts]:
    """New (cell, hidden), each in parts; ``share`` (B, 1) is that of the step's own input."""
    r_in, r_forget, r_new, r_out = relevant.chunk(4, -1)
    i_in, i_forget, i_new, i_out = irrelevant.chunk(4, -1)
    b_in, b_forget, b_new, b_out = bias.chunk(4)
    in_r, in_i, in_b = _three(r_in, i_in, b_in, torch.sigmoid)
    new_r, new_i, new_b = _three(r_new, i_new, b_new, torch.tanh)
    forget_r, forget_i, forget_b = _three(r_forget, i_forget, b_forget, torch.sigmoid)
    own = in_r * (new_r + new_b) + in_b * new_r
    other = in_i * (new_r + new_i + new_b) + (in_r + in_b) * new_i
    # What the biases make alone belongs to the part whose input it is.
    from_bias = in_b * new_b
    own, other = own + share * from_bias, other + (1 - share) * from_bias
    own = own + (forget_r + forget_b) * cell[0]
    other = other + (forget_r + forget_i + forget_b) * cell[1] + forget_i * cell[0]
    out = torch.sigmoid(r_out + i_out + b_out)
    whole = torch.tanh(own + other)
    hidden_own = 0.5 * (torch.tanh(own) + whole - torch.tanh(other))
    hidden_other = 0.5 * (torch.tanh(other) + whole - torch.tanh(own))
    return (own, other), (out * hidden_own, out * hidden_other)


def _three(
    a: Tensor, b: Tensor, c: Tensor, f: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of ``f(a + b + c)``; ``c`` comes first, ``a`` and ``b`` in both orders."""
    whole, alone = f(a + b + c), f(c)
    with_a, with_b = f(a + c), f(b + c)
    own = 0.5 * (with_a - alone + whole - with_b)
    other = 0.5 * (with_b - alone + whole - with_a)
    return own, other, alone.expand_as(own)


__all__ = ["Parts", "check_layers", "decompose", "flat_layers"]
