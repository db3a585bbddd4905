"""Pulls the singular values of every weight to zero, which makes weights low-rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.batches import by_shape, in_batches, svd
from lightning_reg.mechanisms.proximal_penalty import ProximalMode, ProximalPenalty

__all__ = ["NuclearNorm", "nuclear_norm"]


def nuclear_norm(weight: Tensor) -> Tensor:
    """``||W||_* = sum_i s_i(W)``; its gradient is ``U V^T`` of ``W = U diag(s) V^T``.

    Where singular values are zero, ``U V^T`` is taken over the others: the subgradient of the
    least norm.

    Args:
        weight: (out, ...); everything behind the first dimension belongs to one row.

    Returns:
        A scalar, at least 0.
    """
    return svd(weight.flatten(1))[1].sum()


class NuclearNorm(ProximalPenalty):
    """Pulls the singular values of every weight to zero, which makes weights low-rank.

    Recht, Fazel, Parrilo (2007), Guaranteed Minimum-Rank Solutions of Linear Matrix Equations via
    Nuclear Norm Minimization, arXiv:0706.4138; the proximal step is the singular value
    thresholding of Cai, Candès, Shen (2008), A Singular Value Thresholding Algorithm for Matrix
    Completion, arXiv:0810.3286.

    ``R = sum_l ||W_l||_*`` with ``W_l`` (out, in * kernel): the convex envelope of the rank on
    matrices of spectral norm one. Its gradient ``U V^T`` shortens every singular value by the
    same; ``mode="proximal"``, ``s_i <- max(s_i - lr strength, 0)``, makes small ones exactly zero.

    The formulas are the textbook's. The default strength is ours.

    Args:
        strength: ``lambda``, at least 0.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers.
        mode: ``"gradient"`` adds ``U V^T`` once per optimizer step; ``"loss"`` adds the penalty
            to the loss of every micro-batch; ``"proximal"`` thresholds singular values after the
            step, which lowers the rank.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, or if no parameter is chosen.

    Note:
        Over ranks: replica; nothing is communicated. Cost per optimizer step: a singular value
        decomposition of every weight, for layers of one shape together: far more than a few
        passes over the weights. Under ``ddp_reg`` the ranks share the layers out by that cost
        (not in the proximal mode, where each decomposes all); otherwise choose few layers with
        ``parameters``, or a rank at once with a factorized layer. Singular values below the
        rounding of the largest count as zero.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import NuclearNorm
        >>> trainer = L.Trainer(callbacks=[NuclearNorm(1e-3, parameters="head")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Guaranteed Minimum-Rank Solutions of Linear Matrix Equations via Nuclear Norm "
            "Minimization",
            "Recht et al.",
            2007,
            "0706.4138",
        ),
        Paper(
            "A Singular Value Thresholding Algorithm for Matrix Completion",
            "Cai et al.",
            2008,
            "0810.3286",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(nuclear_norm)
    explanation: ClassVar[str] = "pulls singular values to zero"

    def __init__(
        self,
        strength: float | Schedule = 1e-4,
        *,
        parameters: str | ParameterSelection | None = None,
        mode: ProximalMode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, mode=mode, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="NuclearNorm(1e-4)")

    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The penalty of each weight."""
        return torch.stack([nuclear_norm(matrix) for matrix in matrices])

    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Sums of singular values and ``U V^T``, from one decomposition."""
        return in_batches(matrices, _value_and_gradient)

    def proximal_form(self, matrices: Sequence[Tensor], steps: Sequence[float]) -> list[Tensor]:
        """Weights whose singular values are less by the step, or zero."""
        moved = list(matrices)
        for places in by_shape(matrices):
            stack = torch.stack([matrices[i] for i in places])
            thresholds = stack.new_tensor([steps[i] for i in places])
            left, values, right = svd(stack)
            kept = (values - thresholds[:, None]).clamp_min(0)
            for i, matrix in zip(places, (left * kept[:, None]) @ right, strict=True):
                moved[i] = matrix
        return moved

    def cost(self, weight: Tensor) -> float:
        """Multiplications of a decomposition, up to a factor."""
        rows, columns = weight.shape[0], weight[0].numel()
        return float(rows * columns * min(rows, columns))


def _value_and_gradient(stack: Tensor) -> tuple[Tensor, Tensor]:
    left, values, right = svd(stack)
    least = max(stack.shape[-2:]) * torch.finfo(values.dtype).eps * values[:, :1]
    return values.sum(1), (left * (values > least)[:, None]) @ right
