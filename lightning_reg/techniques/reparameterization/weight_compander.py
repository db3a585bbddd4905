"""Passes weights through an arctangent: large ones are bounded, small ones move more easily."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, ParameterSelection
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.reparameterization import Reparameterization

__all__ = ["WeightCompander", "weight_compander"]


def weight_compander(v: Tensor, alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    """``Psi(v) = alpha arctan(v / beta)``, elementwise.

    Odd, increasing, bounded by ``alpha pi / 2``, with slope ``alpha / beta`` at 0.

    Args:
        v: any shape.
        alpha: the scale of the result, above 0; a number or a tensor that broadcasts.
        beta: the scale of the argument, above 0.

    Returns:
        The weights, of the shape of ``v``.
    """
    return alpha * torch.arctan(v / beta)


class WeightCompander(Reparameterization):
    """Passes weights through an arctangent: large ones are bounded, small ones move more easily.

    Cakaj, Mehnert, Yang (2023), Weight Compander: A Simple Weight Reparameterization for
    Regularization, arXiv:2306.16993.

    A layer computes with ``w = Psi(v) = alpha arctan(v / beta)`` and ``v`` is trained, so that
    ``|w| < alpha pi / 2``, and a gradient reaches ``v`` times
    ``Psi'(v) = (alpha / beta) / (1 + (v / beta)^2)``: the nearer a weight is to its bound the less
    it moves, while weights around zero move freely and leave it. ``v`` starts at ``Psi^-1(w)``,
    so the network starts as it was. ``alpha`` and ``beta`` are learned for each layer, as in the
    paper's extension; here through the logarithm of their ratio to where they start, which keeps
    them above 0.

    The paper's abstract describes the function by what it does; the arctangent is from memory of
    the paper and not checked against code, of which none was found. Where ``alpha`` and ``beta``
    start is ours.

    Args:
        alpha: where ``alpha`` starts, above 0, the same in all layers. ``None``: in each layer
            twice what its largest weight needs, so that the bound is twice that weight.
        beta: where ``beta`` starts, above 0. ``None``: equal to ``alpha``, slope 1 at zero.
        learn: train ``alpha`` and ``beta``; they then are parameters of the module during the
            fit, two numbers a layer.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes the weights of all linear and convolutional layers.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``alpha`` or ``beta`` is not above 0, if no parameter is chosen, or if a
            layer has a weight at or beyond the bound that ``alpha`` sets.
        UnsupportedError: if a layer is parametrized already.

    Note:
        Over ranks: replica; ``v``, ``alpha`` and ``beta`` are ordinary parameters. Cost: an
        arctangent over the weights each time a layer uses them, and its backward.

        Weight decay and other penalties act on ``v``, whose names in the module end in
        ``.original`` while training runs; weight decay on ``alpha`` and ``beta`` pulls them to
        where they started. Build the optimizer from ``self.parameters()`` in
        ``configure_optimizers``, or it does not know them. After the fit, and in checkpoints, the
        module has plain weights. It hurts where a few large weights carry the function.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import WeightCompander
        >>> trainer = L.Trainer(callbacks=[WeightCompander()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Weight Compander: A Simple Weight Reparameterization for Regularization",
            "Cakaj et al.",
            2023,
            "2306.16993",
        ),
    )
    exemptions = {
        "neutral": "weights that are a function of others have no setting that does nothing; "
        "leave the callback out",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(weight_compander)
    explanation: ClassVar[str] = "computes with w = alpha arctan(v / beta) and trains v"

    def __init__(
        self,
        alpha: float | None = None,
        beta: float | None = None,
        *,
        learn: bool = True,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(parameters=parameters, name=name)
        for letter, value in (("alpha", alpha), ("beta", beta)):
            if value is not None:
                cure = f"WeightCompander({letter}=1.0)"
                check_range(
                    self, letter, value, 0, math.inf, low_open=True, high_open=True, cure=cure
                )
        self.alpha = alpha
        self.beta = beta
        self.learn = learn

    def parametrization(self, name: str, weight: Tensor) -> nn.Module:
        """The arctangent of one layer."""
        largest = float(weight.abs().max())
        # A layer of zeros gets the scale of a usual initialization.
        needed = (largest or 1 / math.sqrt(weight[0].numel())) / (math.pi / 2)
        alpha = 2 * needed if self.alpha is None else self.alpha
        if largest >= alpha * math.pi / 2:
            raise ArgumentError(
                self,
                f"`alpha` = {alpha} bounds weights by {alpha * math.pi / 2:.4g}, and {name} has "
                f"one of {largest:.4g}",
                cure=f"WeightCompander(alpha={2 * needed:.2g})",
            )
        return _Compander(weight, alpha, alpha if self.beta is None else self.beta, self.learn)


class _Compander(nn.Module):
    """``Psi`` and its inverse."""

    def __init__(self, weight: Tensor, alpha: float, beta: float, learn: bool) -> None:
        super().__init__()
        dtype = weight.dtype
        self.register_buffer("start", torch.tensor([alpha, beta], dtype=dtype))
        self.log_ratio = nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=learn)

    def forward(self, v: Tensor) -> Tensor:
        """``v`` to ``w``."""
        alpha, beta = self._letters()
        return weight_compander(v, alpha, beta)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """``w`` to ``v``; a weight beyond the bound is brought just inside."""
        alpha, beta = self._letters()
        angle = weight / alpha
        most = math.pi / 2 - 1e-3
        return beta * torch.tan(angle.clamp(-most, most))

    def _letters(self) -> tuple[Tensor, Tensor]:
        start: Tensor = self.get_buffer("start")
        alpha, beta = (start * self.log_ratio.exp()).unbind()
        return alpha, beta
