"""L1 and L2 together: sparse, but weights that belong together stay together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.proximal_penalty import (
    ProximalMode,
    ProximalPenalty,
    soft_threshold,
)

__all__ = ["ElasticNet", "elastic_net"]


def elastic_net(weight: Tensor, l1_ratio: float = 0.5) -> Tensor:
    """``rho ||w||_1 + (1 - rho) / 2 ||w||_2^2``; its gradient is ``rho sign(w) + (1 - rho) w``.

    Args:
        weight: any shape.
        l1_ratio: ``rho``, in [0, 1]: 0 is the ridge, 1 the lasso.

    Returns:
        A scalar, at least 0.
    """
    return l1_ratio * weight.abs().sum() + (1 - l1_ratio) / 2 * weight.square().sum()


class ElasticNet(ProximalPenalty):
    """L1 and L2 together: sparse, but weights that belong together stay together.

    Zou, Hastie (2005), Regularization and Variable Selection via the Elastic Net.

    ``R = sum_l rho ||w_l||_1 + (1 - rho) / 2 ||w_l||_2^2``, with ``strength`` and ``l1_ratio`` in
    the meaning of scikit-learn's ``alpha`` and ``l1_ratio``. Of inputs that are correlated the
    lasso keeps one, and which one is chance; the squared part spreads the weight over them.

    The formula is the textbook's, in scikit-learn's parametrization. The default strength is ours,
    that of ``rho`` is scikit-learn's.

    Args:
        strength: the multiplier of both parts, at least 0.
        l1_ratio: ``rho``, the share of the L1 part, in [0, 1].
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers.
        mode: ``"gradient"`` adds the gradient once per optimizer step; ``"loss"`` adds the penalty
            to the loss of every micro-batch; ``"proximal"`` soft-thresholds and shrinks after the
            step, which is what gives exact zeros.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, ``l1_ratio`` outside [0, 1], or no parameter is
            chosen.

    Note:
        Over ranks: replica; nothing is communicated. Cost per optimizer step: four passes over the
        weights; under ``ddp_reg`` each rank makes them for its share of the layers, except in the
        proximal mode. The proximal step uses the learning rate of its parameter group, and under
        Adam not the preconditioner. Set the optimizer's ``weight_decay`` to 0.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ElasticNet
        >>> trainer = L.Trainer(callbacks=[ElasticNet(1e-4, l1_ratio=0.5)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Regularization and Variable Selection via the Elastic Net", "Zou et al.", 2005, None
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(elastic_net)
    explanation: ClassVar[str] = "L1 and L2 penalty together"
    by_rows = True

    def __init__(
        self,
        strength: float | Schedule = 1e-5,
        *,
        l1_ratio: float = 0.5,
        parameters: str | ParameterSelection | None = None,
        mode: ProximalMode = "gradient",
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, mode=mode, name=name)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="ElasticNet(1e-5)")
        check_range(self, "l1_ratio", l1_ratio, 0, 1, cure="ElasticNet(l1_ratio=0.5)")
        self.l1_ratio = l1_ratio

    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The penalty of each weight."""
        return torch.stack([elastic_net(matrix, self.l1_ratio) for matrix in matrices])

    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Both parts of the value and of the gradient."""
        held, ridge = list(matrices), 1 - self.l1_ratio
        values = self.l1_ratio * torch.stack(torch._foreach_norm(held, 1))
        values = values + ridge / 2 * torch.stack(torch._foreach_norm(held)).square()
        return values, self.gradients(matrices)

    def gradients(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Both parts of the gradient."""
        gradients = list(torch._foreach_sign(list(matrices)))
        torch._foreach_mul_(gradients, self.l1_ratio)
        torch._foreach_add_(gradients, list(matrices), alpha=1 - self.l1_ratio)
        return gradients

    def proximal_form(self, matrices: Sequence[Tensor], steps: Sequence[float]) -> list[Tensor]:
        """Soft-thresholded, then shrunk."""
        moved = soft_threshold(matrices, [self.l1_ratio * t for t in steps])
        return list(torch._foreach_div(moved, [1 + (1 - self.l1_ratio) * t for t in steps]))
