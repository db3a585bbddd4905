"""Keeps the weight vector of every output unit within a ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, ParameterUpdate, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.projection import Projection
from lightning_reg.mechanisms.weight_penalty import as_matrices, as_weights

__all__ = ["MaxNorm", "max_norm"]


def max_norm(weight: Tensor, radius: float = 3.0) -> Tensor:
    """``w_o min(1, c / ||w_o||_2)`` for each row ``w_o``: the nearest row in the ball.

    Args:
        weight: (out, ...); everything behind the first dimension belongs to one row.
        radius: ``c``, above 0.

    Returns:
        The projected weight, of the same shape.
    """
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    factors = _factors(norms, radius)
    return weight * factors.view(-1, *[1] * (weight.ndim - 1))


class MaxNorm(Projection):
    """Keeps the weight vector of every output unit within a ball.

    Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to
    Prevent Neural Networks from Overfitting, section 5.1; as a constraint Srebro, Rennie, Jaakkola
    (2004), Maximum-Margin Matrix Factorization.

    After each optimizer step ``w_o <- w_o min(1, c / ||w_o||_2)`` for the incoming weights ``w_o``
    of every unit. Unlike a penalty it does nothing to units inside the ball, and lets a large
    learning rate search without weights blowing up.

    The projection is the paper's, from memory; the default of ``c = 3`` lies in the range of 3 to
    4 that we remember from there.

    Args:
        strength: the share of the way to the projection, in [0, 1]; the method is 1.
        radius: ``c``, above 0.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers. Biases are not part of the
            rows.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], ``radius`` is not above 0, or no
            parameter is chosen.

    Note:
        Over ranks: replica; every rank projects alike, and nothing is communicated. Cost per
        optimizer step: a norm a unit and a pass over the weights. The log shows the largest norm
        of a row before the projection. Momentum is not projected. In front of a BatchNorm it only
        bounds how small the effective learning rate becomes.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MaxNorm
        >>> trainer = L.Trainer(callbacks=[MaxNorm(radius=3.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
            "Srivastava et al.",
            2014,
            None,
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(max_norm)
    explanation: ClassVar[str] = "keeps each unit's weight vector within a ball"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        radius: float = 3.0,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        check_range(
            self,
            "radius",
            radius,
            0,
            math.inf,
            low_open=True,
            high_open=True,
            cure="MaxNorm(radius=3.0)",
        )
        self.radius = radius

    def project_weights(
        self, update: ParameterUpdate, weights: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Rows within the ball, and the largest norm before."""
        matrices = as_matrices(update.module, weights)
        norms = [torch.linalg.vector_norm(m, dim=1, keepdim=True) for m in matrices]
        factors = [_factors(norm, self.radius) for norm in norms]
        projected = list(torch._foreach_mul(matrices, factors))
        largest = torch.stack([norm.max() for norm in norms]).max()
        return as_weights(update.module, weights, projected), largest


def _factors(norms: Tensor, radius: float) -> Tensor:
    # A row of zeros gives c / 0, which is no less than 1.
    return (radius / norms).clamp_max(1.0)
