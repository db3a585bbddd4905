"""Pulls whole groups of weights, filters or inputs, to zero together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.proximal_penalty import ProximalMode, ProximalPenalty

__all__ = ["GroupLasso", "group_lasso"]

Groups = Literal["rows", "columns"]
_GROUPS = ("rows", "columns")


def group_lasso(weight: Tensor, groups: Groups = "rows") -> Tensor:
    """``sum_g sqrt(d_g) ||w_g||_2`` over the groups ``w_g`` of ``d_g`` weights.

    The gradient of a group is ``sqrt(d_g) w_g / ||w_g||``; a group of zeros, where the norm has
    none, gets zero.

    Args:
        weight: (out, ...); everything behind the first dimension belongs to one row.
        groups: ``"rows"``, the weights of one output unit (neuron, filter); ``"columns"``, those
            of one position of all rows (an input of a linear layer, one place of a channel in all
            filters of a convolution).

    Returns:
        A scalar, at least 0.
    """
    matrix = weight.flatten(1)
    dimension = _dimension(groups)
    norms = torch.linalg.vector_norm(matrix, dim=dimension)
    total: Tensor = matrix.shape[dimension] ** 0.5 * norms.sum()
    return total


class GroupLasso(ProximalPenalty):
    """Pulls whole groups of weights, filters or inputs, to zero together.

    Yuan, Lin (2006), Model Selection and Estimation in Regression with Grouped Variables; for
    networks Wen, Wu, Wang, Chen, Li (2016), Learning Structured Sparsity in Deep Neural Networks,
    arXiv:1608.03665.

    ``R = sum_l sum_g sqrt(d_g) ||w_lg||_2``, where a group is what can be cut out of a layer: the
    weight vector of an output unit, or of an input. The square root keeps layers with large groups
    from being favoured. A group survives or vanishes as a whole: in ``mode="proximal"``, where it
    is multiplied by ``max(1 - lr strength sqrt(d_g) / ||w_g||, 0)``, exactly.

    The formula is the textbook's, from memory; Wen et al. leave out the factor ``sqrt(d_g)``. The
    default strength is ours.

    Args:
        strength: ``lambda``, at least 0.
        groups: ``"rows"``: the weights of one neuron or filter; ``"columns"``: those of one
            input of a linear layer, or of one place of a channel in all filters ("filter
            shapes").
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers.
        mode: ``"gradient"`` adds the gradient once per optimizer step; ``"loss"`` adds the penalty
            to the loss of every micro-batch; ``"proximal"`` steps after the optimizer, which is
            what makes groups exactly zero.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, ``groups`` is neither of the two, or no
            parameter is chosen.

    Note:
        Over ranks: replica; nothing is communicated. Cost per optimizer step: a norm a group and
        one pass over the weights; under ``ddp_reg`` each rank makes them for its share of the
        layers, except in the proximal mode. Groups of zeros keep their place in the tensor and
        their bias: cut them out after training. Exclude the last layer, whose rows are classes.
        In front of a BatchNorm shrinking a filter changes no function, so put the penalty on the
        norm's scale instead: ``L1Penalty(parameters="bn.*weight")``.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import GroupLasso
        >>> trainer = L.Trainer(callbacks=[GroupLasso(1e-4, mode="proximal")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Model Selection and Estimation in Regression with Grouped Variables",
            "Yuan et al.",
            2006,
            None,
        ),
        Paper(
            "Learning Structured Sparsity in Deep Neural Networks",
            "Wen et al.",
            2016,
            "1608.03665",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(group_lasso)
    explanation: ClassVar[str] = "pulls whole filters or inputs to zero"

    def __init__(
        self,
        strength: float | Schedule = 1e-4,
        *,
        groups: Groups = "rows",
        parameters: str | ParameterSelection | None = None,
        mode: ProximalMode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, mode=mode, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="GroupLasso(1e-4)")
        if groups not in _GROUPS:
            raise ArgumentError(
                self,
                f"`groups` must be one of {', '.join(_GROUPS)}, got {groups!r}",
                cure='GroupLasso(groups="rows")',
            )
        self.groups = groups
        self.by_rows = groups == "rows"

    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The penalty of each weight."""
        return torch.stack([group_lasso(matrix, self.groups) for matrix in matrices])

    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The penalty and the gradient of each weight, from one norm a group."""
        norms, scales = self._norms(matrices), self._scales(matrices)
        values = torch.stack([s * n.sum() for s, n in zip(scales, norms, strict=True)])
        return values, _pulled(matrices, norms, scales)

    def gradients(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each weight."""
        return _pulled(matrices, self._norms(matrices), self._scales(matrices))

    def proximal_form(self, matrices: Sequence[Tensor], steps: Sequence[float]) -> list[Tensor]:
        """Groups that are shorter by their step, or zero."""
        shortened = [
            (1 - t * scale / norm).clamp_min(0)
            for norm, scale, t in zip(
                self._norms(matrices), self._scales(matrices), steps, strict=True
            )
        ]
        # 0 / 0 in a group of zeros, which stays as it is.
        factors = [f.nan_to_num_(0.0) for f in shortened]
        return list(torch._foreach_mul(list(matrices), factors))

    def _norms(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        dimension = _dimension(self.groups)
        return [torch.linalg.vector_norm(m, dim=dimension, keepdim=True) for m in matrices]

    def _scales(self, matrices: Sequence[Tensor]) -> list[float]:
        return [float(m.shape[_dimension(self.groups)]) ** 0.5 for m in matrices]


def _pulled(
    matrices: Sequence[Tensor], norms: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    pulls = [torch.where(n > 0, s / n, 0.0) for s, n in zip(scales, norms, strict=True)]
    return list(torch._foreach_mul(list(matrices), pulls))


def _dimension(groups: Groups) -> int:
    """The dimension of the matrix along which a group lies."""
    return 1 if groups == "rows" else 0
