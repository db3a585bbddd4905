"""The SAM family's way up: a step of length rho along the gradient, scaled by the weights or not.

A technique of the family derives from :class:`NormalizedAscent` and says what it does with the
gradient there; see :class:`~lightning_reg.mechanisms.weight_perturbation.WeightPerturbation`. The
mechanism takes care of the step, its arguments, and of which parameters are scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.errors import check_range
from lightning_reg.engine.schedule import Schedule
from lightning_reg.mechanisms.weight_perturbation import WeightPerturbation


@torch.no_grad()
def normalized_ascent(
    gradients: Sequence[Tensor],
    rho: float,
    *,
    weights: Sequence[Tensor | None] | None = None,
    eta: float = 0.01,
) -> list[Tensor]:
    """``rho T^2 g / |T g|`` with one norm over all tensors; ``T`` is 1, or ``|w| + eta``.

    Args:
        gradients: one gradient a weight, of any shapes.
        rho: the length of the step.
        weights: ``None``, or one tensor a gradient, of its shape; ``None`` in the place of a
            parameter that is not scaled.
        eta: keeps the scale of weights near 0 away from 0.

    Returns:
        One displacement a gradient, in its shape and dtype; zeros for zero gradients.
    """
    scaled = [i for i, w in enumerate(weights or ()) if w is not None]
    scales = _scales([weights[i] for i in scaled], eta) if weights is not None else []
    directions = _times(list(gradients), scaled, scales)
    factor = rho / (joint_norm(directions) + 1e-12)
    return list(torch._foreach_mul(_times(directions, scaled, scales), factor))


def _scales(weights: Sequence[Tensor | None], eta: float) -> list[Tensor]:
    magnitudes = torch._foreach_abs([w for w in weights if w is not None])
    return list(torch._foreach_add(magnitudes, eta)) if magnitudes else []


def _times(tensors: list[Tensor], indices: list[int], scales: list[Tensor]) -> list[Tensor]:
    """``tensors`` with those at ``indices`` multiplied by their scales."""
    if not indices:
        return tensors
    products = torch._foreach_mul([tensors[i] for i in indices], scales)  # type: ignore[arg-type]
    result = list(tensors)
    for index, product in zip(indices, products, strict=True):
        result[index] = product
    return result


def joint_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The length of all tensors as one vector."""
    # In half precision the norm of many gradients overflows.
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm(list(tensors), 2, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def joint_dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of tensors as one vector each, in float32 at least."""
    products = torch._foreach_mul(list(one), list(other))
    dtype = torch.promote_types(products[0].dtype, torch.float32)
    return torch.cat([p.reshape(-1) for p in products]).sum(dtype=dtype)


class NormalizedAscent(WeightPerturbation):
    """Base of the SAM family.

    Args:
        rho: the radius; 0 turns the technique off.
        adaptive: scale the neighbourhood by the weights, of parameters whose name contains
            ``weight``.
        eta: the floor of that scale.
        others: arguments of :class:`WeightPerturbation`.
    """

    def __init__(
        self,
        rho: float | Schedule,
        *,
        adaptive: bool = False,
        eta: float = 0.01,
        **others: Any,
    ) -> None:
        name, infinite = type(self).__name__, float("inf")
        if not isinstance(rho, Schedule):
            check_range(self, "rho", rho, 0, infinite, high_open=True, cure=f"{name}(rho=0.05)")
        super().__init__(rho, **others)
        check_range(self, "eta", eta, 0, infinite, high_open=True, cure=f"{name}(eta=0.01)")
        self.adaptive = adaptive
        self.eta = eta
        self._scaled: set[int] = set()

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note which parameters are weights by name."""
        super().on_reference(trainer, pl_module)
        named = pl_module.named_parameters()
        self._scaled = {id(p) for n, p in named if "weight" in n} if self.adaptive else set()

    def perturbation(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], strength: float
    ) -> list[Tensor]:
        """One ascent step."""
        rho = strength / self.steps
        if not self.adaptive:
            return normalized_ascent(gradients, rho)
        scaled = [w if id(w) in self._scaled else None for w in weights]
        return normalized_ascent(gradients, rho, weights=scaled, eta=self.eta)


__all__ = ["NormalizedAscent", "joint_dot", "joint_norm", "normalized_ascent"]
