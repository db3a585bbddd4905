"""Keeps a network trainable by holding the largest singular value of every weight at one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.sharding import whole
from lightning_reg.engine.step import RunContext, full_precision
from lightning_reg.mechanisms.batches import by_shape, svd
from lightning_reg.mechanisms.selected_weights import EVERYTHING
from lightning_reg.mechanisms.weight_penalty import Mode, NamedPenalty, as_matrices, as_weights

__all__ = ["SpectralRegularization", "spectral_regularization"]

Kind = Literal["matrix", "scale", "bias"]
_KINDS = ("matrix", "scale", "bias")


def spectral_regularization(weight: Tensor, k: int = 2, kind: Kind = "matrix") -> Tensor:
    """``(s_1(W)^k - 1)^2``; ``sum_i (g_i^k - 1)^2`` of a norm's scale; ``||b||^(2k)`` of a bias.

    ``s_1`` is the largest singular value, whose gradient is ``u v^T``.

    Args:
        weight: ``W`` (out, ...), everything behind the first dimension belonging to one row; ``g``
            or ``b``, any shape.
        k: the exponent, from 1.
        kind: ``"matrix"``, ``"scale"`` or ``"bias"``.

    Returns:
        A scalar, at least 0.
    """
    if kind == "matrix":
        return (svd(weight.flatten(1))[1].amax() ** k - 1).square()
    if kind == "scale":
        return (weight**k - 1).square().sum()
    return weight.square().sum() ** k


class SpectralRegularization(NamedPenalty):
    """Keeps a network trainable by holding the largest singular value of every weight at one.

    Lewandowski, Bortkiewicz, Kumar, György, Schuurmans, Ostaszewski, Machado (2024), Learning
    Continually by Spectral Regularization, arXiv:2406.06811.

    ``R = sum_l (s_1(W_l)^k - 1)^2 + sum_l ||b_l||^(2k)`` with ``k = 2``; of normalization layers
    ``sum_i (g_i^k - 1)^2``. Where data or labels change during training, weights grow until
    gradients no longer reach every layer in every direction, and the network learns later tasks
    worse than a fresh one would. Holding layers near the gain that they were initialized with
    keeps it plastic. Unlike L2 it does not pull the other singular values to zero.

    The formula is from memory of the paper, not checked against code, of which none was found. Its
    treatment of normalization layers (each scale to one) follows from a diagonal matrix. The
    default strength is ours.

    Args:
        strength: ``lambda``, at least 0.
        k: the exponent, a whole number from 1.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes everything: weights of two or more dimensions, scales of normalization layers
            and biases. Other vectors are left alone.
        mode: ``"gradient"`` adds the closed-form gradient once per optimizer step, by one step of
            power iteration each; ``"loss"`` adds the exact penalty, by a singular value
            decomposition, to the loss of every micro-batch.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, ``k`` is not a whole number from 1, or no
            parameter is chosen.

    Note:
        Over ranks: replica; nothing is communicated, and every rank computes the whole. Cost per
        optimizer step: two products of every weight with a vector, batched over layers of one
        shape, and one outer product. The singular vectors start from an exact decomposition at the
        start of the fit, follow the weights from step to step, and are saved. Where the two largest
        singular values cross, the iteration needs some steps to follow. Set the optimizer's
        ``weight_decay`` to 0. In a single task it restricts the network for nothing.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SpectralRegularization
        >>> trainer = L.Trainer(callbacks=[SpectralRegularization(1e-3)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Learning Continually by Spectral Regularization",
            "Lewandowski et al.",
            2024,
            "2406.06811",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(spectral_regularization)
    explanation: ClassVar[str] = "holds the largest singular value of weights at 1"
    default_selection = EVERYTHING
    splits: ClassVar[bool] = False

    def __init__(
        self,
        strength: float | Schedule = 1e-3,
        *,
        k: int = 2,
        parameters: str | ParameterSelection | None = None,
        mode: Mode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, mode=mode, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="SpectralRegularization(1e-3)")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ArgumentError(
                self,
                f"`k` must be a whole number from 1, got {k!r}",
                cure="SpectralRegularization(k=2)",
            )
        self.k = k
        self._vectors: dict[str, Tensor] = {}

    def selected(self, context: RunContext) -> dict[str, nn.Parameter]:
        """The chosen weights that are one of the three kinds."""
        chosen = super().selected(context)
        return {n: w for n, w in chosen.items() if _kind(context.module, n, w) is not None}

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Left singular vectors of all weights, unless a checkpoint brought them."""
        chosen = self.selection.select(pl_module, self)
        matrices = {n: w for n, w in chosen.items() if _kind(pl_module, n, w) == "matrix"}
        known = {n: u for n, u in self._vectors.items() if n in matrices}
        self._vectors = known
        new = {n: w for n, w in matrices.items() if n not in known or not _fits(known[n], w)}
        with torch.no_grad():
            for name, matrix in zip(new, as_matrices(pl_module, new), strict=True):
                self._vectors[name] = torch.linalg.svd(matrix, full_matrices=False)[0][:, 0]
        for name, weight in matrices.items():
            self._vectors[name] = self._vectors[name].to(weight.device)

    def values_of(self, context: RunContext, weights: Mapping[str, nn.Parameter]) -> Tensor:
        """The exact penalty of each weight."""
        values = []
        for name, weight in weights.items():
            kind = _kind(context.module, name, weight)
            assert kind is not None
            tensor = (
                as_matrices(context.module, {name: weight})[0]
                if kind == "matrix"
                else full_precision(whole(weight))
            )
            values.append(spectral_regularization(tensor, self.k, kind))
        return torch.stack(values)

    def closed_form_of(
        self, context: RunContext, weights: Mapping[str, nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """The penalty and the gradient of each weight."""
        kinds = {n: _kind(context.module, n, w) for n, w in weights.items()}
        found: dict[str, tuple[Tensor, Tensor]] = {}
        matrices = {n: w for n, w in weights.items() if kinds[n] == "matrix"}
        if matrices:
            found |= self._of_matrices(context.module, matrices)
        for name, weight in weights.items():
            if kinds[name] == "scale":
                found[name] = _of_scale(full_precision(whole(weight.detach())), self.k)
            elif kinds[name] == "bias":
                found[name] = _of_bias(full_precision(whole(weight.detach())), self.k)
        return torch.stack([found[n][0] for n in weights]), [found[n][1] for n in weights]

    def _of_matrices(
        self, module: nn.Module, weights: Mapping[str, nn.Parameter]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        matrices, names = as_matrices(module, weights), list(weights)
        values: list[Tensor] = list(matrices)
        gradients: list[Tensor] = list(matrices)
        for places in by_shape(matrices):
            stack = torch.stack([matrices[i] for i in places])
            # A layer that was unfrozen later starts from its rows' mean.
            before = torch.stack(
                [self._vectors.get(names[i], matrices[i].mean(1)).to(stack) for i in places]
            )
            after, value, gradient = _spectral(stack, before, self.k)
            for j, i in enumerate(places):
                self._vectors[names[i]] = after[j]
                values[i], gradients[i] = value[j], gradient[j]
        shaped = as_weights(module, weights, gradients)
        return dict(zip(names, zip(values, shaped, strict=True), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The left singular vector of each weight."""
        return {"vectors": dict(self._vectors)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the vectors of a checkpoint."""
        self._vectors = {name: u.clone() for name, u in state_dict["vectors"].items()}


def _kind(module: nn.Module, name: str, weight: Tensor) -> Kind | None:
    path, _, attribute = name.rpartition(".")
    if attribute == "bias":
        return "bias"
    if "norm" in type(module.get_submodule(path)).__name__.lower():
        return "scale" if attribute == "weight" else None
    return "matrix" if weight.ndim > 1 else None


def _fits(vector: Tensor, weight: Tensor) -> bool:
    # A transposed convolution has its rows in the second dimension.
    return len(vector) in (weight.shape[0], weight.shape[1])


def _spectral(stack: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """One step of power iteration on (N, rows, columns): new vectors, penalties and gradients."""
    right = _unit(torch.einsum("nr,nrc->nc", vectors, stack))
    product = torch.einsum("nrc,nc->nr", stack, right)
    sigma = torch.linalg.vector_norm(product, dim=1)
    left = _unit(product)
    slope = 2 * (sigma**k - 1) * k * sigma ** (k - 1)
    gradients = (slope[:, None] * left)[:, :, None] * right[:, None, :]
    # Weights that are zero or not finite leave no direction; the old one stays.
    usable = (sigma > 0) & sigma.isfinite()
    return torch.where(usable[:, None], left, vectors), (sigma**k - 1).square(), gradients


def _unit(vectors: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    unit: Tensor = vectors / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return unit


def _of_scale(scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distance = scale**k - 1
    return distance.square().sum(), 2 * k * distance * scale ** (k - 1)


def _of_bias(bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    square = bias.square().sum()
    return square**k, 2 * k * square ** (k - 1) * bias
