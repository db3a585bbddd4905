"""Trains embeddings in hyperbolic space: the Poincaré ball, with its own gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, ParameterUpdate, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.gradient_transform import GradientTransform
from lightning_reg.mechanisms.projection import Projection

__all__ = ["PoincareProjection", "poincare_distance", "poincare_projection"]


def poincare_projection(
    weight: Tensor, gradient: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Rows brought into the ball, and their gradients in its metric.

    ``w <- w (1 - eps) / ||w||`` where ``||w|| > 1 - eps``, and ``g <- (1 - ||w||^2)^2 / 4 g`` for
    the given ``w``: the inverse of the ball's metric tensor.

    Args:
        weight: points ``w`` (..., d).
        gradient: ``g``, of the same shape.
        eps: how far points stay from the boundary.

    Returns:
        The new points and the new gradients.
    """
    return _inside(weight, eps), _riemannian(weight, gradient)


def poincare_distance(u: Tensor, v: Tensor, eps: float = 1e-5) -> Tensor:
    """``arcosh(1 + 2 ||u - v||^2 / ((1 - ||u||^2) (1 - ||v||^2)))``, the distance in the ball.

    Args:
        u: points (..., d) with ``||u|| < 1``.
        v: points that broadcast with ``u``.
        eps: squared norms count at most ``1 - eps``.

    Returns:
        (...), at least 0. Where two points meet, the distance has no gradient; it is taken as 0.
    """
    alpha = 1 - u.square().sum(-1).clamp_max(1 - eps)
    beta = 1 - v.square().sum(-1).clamp_max(1 - eps)
    excess = 2 * (u - v).square().sum(-1) / (alpha * beta)
    # arcosh(1 + x) = log1p(x + sqrt(x (x + 2))) is exact near 0, where the root has no derivative.
    safe = excess.clamp_min(torch.finfo(excess.dtype).tiny)
    distance = torch.log1p(safe + (safe * (safe + 2)).sqrt())
    return torch.where(excess > 0, distance, 0.0 * excess)


class PoincareProjection(Projection, GradientTransform):
    """Trains embeddings in hyperbolic space: the Poincaré ball, with its own gradient.

    Nickel, Kiela (2017), Poincaré Embeddings for Learning Hierarchical Representations,
    arXiv:1705.08039.

    Riemannian SGD: ``w <- proj(w - lr (1 - ||w||^2)^2 / 4 dL/dw)`` for every row ``w`` of an
    embedding, with ``proj(w) = (1 - eps) w / ||w||`` where ``||w||`` exceeds ``1 - eps``. Volume
    grows exponentially towards the boundary, as a tree's leaves do with its depth, so hierarchies
    fit into few dimensions. Compute the loss from
    :func:`lightning_reg.functional.poincare_distance`:
    ``-log(e^-d(u, v) / sum_v' e^-d(u, v'))`` over related ``v`` and unrelated ``v'``, from rows
    that start small (uniform within 1e-3), with a tenth of the learning rate for some epochs.

    Gradient, projection and distance are those of facebookresearch/poincare-embeddings@b1364a1,
    hype/manifolds/poincare.py (values from it are in the tests); that code also cuts sparse
    gradients off at norm 5 and bounds the gradient of the distance where two points meet.

    Args:
        strength: the share of both changes, in [0, 1]; the method is 1.
        eps: how far points stay from the boundary, in (0, 1).
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all ``nn.Embedding``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], ``eps`` is outside (0, 1), or no
            parameter is chosen.
        RegularizationError: if the gradient is sparse.

    Note:
        Over ranks: replica; every rank changes the reduced gradients and the weights alike, and
        nothing is communicated. Cost per optimizer step: a norm a row and two passes over the
        weights. The log shows the largest norm of a row before the projection. Use plain SGD:
        Adam divides the metric's factor out again, and momentum belongs to another tangent space.
        Set ``weight_decay`` to 0. Below 1, ``strength`` can leave points outside the ball.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import PoincareProjection
        >>> trainer = L.Trainer(callbacks=[PoincareProjection()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Poincaré Embeddings for Learning Hierarchical Representations",
            "Nickel et al.",
            2017,
            "1705.08039",
        ),
    )
    reads: ClassVar[frozenset[str]] = frozenset({"gradients", "weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradients", "weights"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(poincare_projection)
    explanation: ClassVar[str] = "trains embeddings in the Poincaré ball"
    default_selection = ParameterSelection(types=("Embedding",))

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        eps: float = 1e-5,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        cure = "PoincareProjection(eps=1e-5)"
        check_range(self, "eps", eps, 0, 1, low_open=True, high_open=True, cure=cure)
        self.eps = eps

    def transform(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Gradients in the metric of the ball."""
        return [_riemannian(w, g) for w, g in zip(weights, gradients, strict=True)], None

    def project_weights(
        self, update: ParameterUpdate, weights: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Rows inside the ball, and the largest norm before."""
        largest = torch.stack([torch.linalg.vector_norm(w, dim=-1).max() for w in weights.values()])
        return [_inside(w, self.eps) for w in weights.values()], largest.max()


def _riemannian(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient * (1 - weight.square().sum(-1, keepdim=True)).square() / 4


def _inside(weight: Tensor, eps: float) -> Tensor:
    norms = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return weight * ((1 - eps) / norms).clamp_max(1.0)
