"""Pulls the weight vector of every output unit towards norm one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, ParameterSelection, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.weight_penalty import Mode, WeightPenalty

__all__ = ["NormLoss", "norm_loss"]


def norm_loss(weight: Tensor) -> Tensor:
    """``sum_o (1 - ||w_o||)^2`` over the rows ``w_o`` of a weight.

    The gradient of a row is ``2 (1 - 1 / ||w_o||) w_o``; a row of zeros, where the norm has no
    gradient, gets none.

    Args:
        weight: (out, ...); everything behind the first dimension belongs to one row.

    Returns:
        A scalar, at least 0.
    """
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    total: Tensor = (1 - norms).square().sum()
    return total


class NormLoss(WeightPenalty):
    """Pulls the weight vector of every output unit towards norm one (the oblique manifold).

    Georgiou, Schmitt, Bäck, Chen, Lew (2021), Norm Loss: An efficient yet effective regularization
    method for deep neural networks, arXiv:2103.06583.

    ``R = sum_l sum_o (1 - ||w_lo||_2)^2``, where ``w_lo`` is the flattened filter of output unit
    ``o`` of layer ``l``: (in,) of a linear layer, (in / groups * kernel,) of a convolution. In
    place of weight decay, which pulls every weight to zero, each filter is pulled to the unit
    sphere, from inside as well as from outside. Biases and normalization layers are left alone.

    The formula is from memory of the paper (its abstract gives the target norm only) and not
    checked against code, of which none was found. The default strength is ours, of the size that
    we remember from the paper.

    Args:
        strength: ``lambda``, at least 0.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers.
        mode: ``"gradient"`` adds the closed-form gradient once per optimizer step; ``"loss"``
            adds the penalty to the loss of every micro-batch. Equal to rounding.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, or if no parameter is chosen.

    Note:
        Over ranks: replica; nothing is communicated. Under ``ddp_reg`` each rank computes its
        share of the layers, under ``ddp`` every rank all of them. Cost per optimizer step:
        one norm a layer and one pass over the weights.

        Set the optimizer's ``weight_decay`` to 0 on the same weights: it pulls elsewhere. The
        pull says nothing to a layer in front of a BatchNorm but sets its effective learning rate;
        in a last layer it fixes the scale of the logits, which hurts where they have to grow.
        Exclude that layer with ``parameters=ParameterSelection(exclude="head")``.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import NormLoss
        >>> trainer = L.Trainer(callbacks=[NormLoss(0.01)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Preprint: Norm Loss: An efficient yet effective regularization method for deep "
            "neural networks",
            "Georgiou et al.",
            2021,
            "2103.06583",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(norm_loss)
    explanation: ClassVar[str] = "pulls each unit's weight vector to norm 1"
    by_rows = True

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
            check_range(self, "strength", strength, 0, cure="NormLoss(0.01)")

    def values(self, matrices: Sequence[Tensor]) -> Tensor:
        """The penalty of each weight."""
        return torch.stack([norm_loss(matrix) for matrix in matrices])

    def closed_form(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The penalty and the gradient of each weight, from one norm a row."""
        norms = _norms(matrices)
        values = torch.stack([(1 - norm).square().sum() for norm in norms])
        return values, _pulled(matrices, norms)

    def gradients(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each weight."""
        return _pulled(matrices, _norms(matrices))


def _norms(matrices: Sequence[Tensor]) -> list[Tensor]:
    return [torch.linalg.vector_norm(m, dim=1, keepdim=True) for m in matrices]


def _pulled(matrices: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor]:
    pulls = [torch.where(norm > 0, 2 - 2 / norm, 0.0) for norm in norms]
    return list(torch._foreach_mul(list(matrices), pulls))
