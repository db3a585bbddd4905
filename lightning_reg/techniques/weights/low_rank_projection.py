"""Keeps weights at a rank, by cutting the smallest singular values off after each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    ParameterSelection,
    ParameterUpdate,
    Schedule,
)
from lightning_reg.mechanisms.batches import by_shape, svd
from lightning_reg.mechanisms.projection import Projection
from lightning_reg.mechanisms.weight_penalty import as_matrices, as_weights

__all__ = ["LowRankProjection", "low_rank_projection"]


def low_rank_projection(weight: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank: ``U_r diag(s_1 .. s_r) V_r^T`` of ``W = U diag(s) V^T``.

    Its distance to ``W`` is ``sqrt(sum_{i > r} s_i^2)`` (Eckart, Young).

    Args:
        weight: ``W`` (out, ...); everything behind the first dimension belongs to one row.
        rank: ``r``, from 1.

    Returns:
        The projected weight, of the same shape.
    """
    return _truncated(weight.flatten(1), rank)[0].view_as(weight)


class LowRankProjection(Projection):
    """Keeps weights at a rank, by cutting the smallest singular values off after each step.

    Lee, Lyu, Yao (2022), Supervised Dictionary Learning with Auxiliary Covariates,
    arXiv:2206.06774.

    ``Z <- P_r(Z - lr dL/dZ)`` with the truncated singular value decomposition ``P_r``: projected
    gradient descent on the matrices of rank ``r``, which for their model converges at a geometric
    rate to the best of them. There ``Z = [A; B]`` stacks the weights ``A`` of a classifier on a
    reconstruction ``B`` of the data, which thereby share a dictionary (``together=True``), and
    the loss, which is yours to compute, is ``NLL(y | A, x, covariates) + xi ||X - B||_F^2``.

    The method is from the abstract and memory of the paper, not checked against code.

    Args:
        strength: the share of the way to the projection, in [0, 1]; the method is 1.
        rank: ``r``, a whole number from 1. A weight of a lower rank is left as it is.
        together: stack the chosen weights by rows and project them as one matrix; they need as
            many columns each.
        every: optimizer steps from one projection to the next, from 1. Between them the rank
            grows.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], ``rank`` or ``every`` is not a whole
            number from 1, no parameter is chosen, or weights that are to be stacked differ in
            their columns.

    Note:
        Over ranks: replica; every rank projects alike, and nothing is communicated. Cost of a
        projection: a singular value decomposition of each weight, for layers of one shape
        together. The log shows the share of the squared norm that was cut off. Momentum and
        Adam's averages are not projected: they bring part of what is cut back in the next step,
        so the guarantee is for plain SGD. Weights keep their shape and cost; factorize them after
        training.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import LowRankProjection
        >>> low = LowRankProjection(rank=4, parameters="encoder")
        >>> trainer = L.Trainer(callbacks=[low], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Supervised Dictionary Learning with Auxiliary Covariates",
            "Lee et al.",
            2022,
            "2206.06774",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(low_rank_projection)
    explanation: ClassVar[str] = "keeps weights at a rank"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        rank: int = 8,
        together: bool = False,
        every: int = 1,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        for letter, value in (("rank", rank), ("every", every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(
                    self,
                    f"`{letter}` must be a whole number from 1, got {value!r}",
                    cure=f"LowRankProjection({letter}=8)",
                )
        self.rank = rank
        self.together = together
        self.every = every

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an empty choice, and weights that cannot be stacked."""
        super().validate(trainer, pl_module)
        if not self.together:
            return
        chosen = self.selection.select(pl_module, self)
        columns = {
            n: m.shape[1] for n, m in zip(chosen, as_matrices(pl_module, chosen), strict=True)
        }
        if len(set(columns.values())) > 1:
            raise ArgumentError(
                self,
                f"stacks weights by rows, and they have columns {columns}",
                cure="LowRankProjection(together=False)",
            )

    def project(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 8, every so many steps."""
        return super().project(update) if update.global_step % self.every == 0 else None

    def project_weights(
        self, update: ParameterUpdate, weights: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Weights of the rank, and the share that was cut off."""
        matrices = as_matrices(update.module, weights)
        sizes = [len(m) for m in matrices]
        held = [torch.cat(matrices)] if self.together else matrices
        projected, lost = list(held), []
        for places in by_shape(held):
            stack, cut = _truncated(torch.stack([held[i] for i in places]), self.rank)
            lost.append(cut.sum())
            for i, matrix in zip(places, stack, strict=True):
                projected[i] = matrix
        if self.together:
            projected = list(projected[0].split(sizes))
        total = torch.stack(torch._foreach_norm(held)).square().sum()
        share = torch.stack(lost).sum() / total.clamp_min(torch.finfo(total.dtype).tiny)
        return as_weights(update.module, weights, projected), share


def _truncated(stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Matrices (..., n, m) at the rank, and the squared norm of what is cut off."""
    left, values, right = svd(stack)
    lost = values[..., rank:].square().sum(-1)
    if values.shape[-1] <= rank:
        return stack, lost
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :], lost
