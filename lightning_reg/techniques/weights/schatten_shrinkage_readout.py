"""Solves for a linear head with a bounded bias: ridge, or its nuclear and spectral siblings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.closed_form_readout import ClosedFormReadout, Moments

__all__ = ["SchattenShrinkageReadout", "schatten_shrinkage_readout", "shrinkage_gains"]

Norm = Literal["nuclear", "spectral", "frobenius"]
_NORMS = ("nuclear", "spectral", "frobenius")
# Halvings of a bracket of lambda: it ends at neighboring numbers of float64.
_HALVINGS = 64


def schatten_shrinkage_readout(
    gram: Tensor, cross: Tensor, shrinkage: float, norm: Norm = "nuclear"
) -> Tensor:
    """``argmin_L tr(L L^T)`` so that ``||L X - I||_p <= C``, applied to ``y``.

    With ``X = U diag(s) V^T`` the estimate is ``sum_i g_i / s_i^2 v_i v_i^T (X^T Y)``, the
    gains ``g`` being those of :func:`shrinkage_gains`. Directions in which ``X`` has no variance
    stay at 0.

    Args:
        gram: ``X^T X`` (d, d).
        cross: ``X^T Y`` (d, c).
        shrinkage: ``C`` as a share, in [0, 1], of the bias ``||-I||_p`` of the estimate 0.
        norm: the Schatten norm: ``"nuclear"`` (p = 1), ``"frobenius"`` (2), ``"spectral"``
            (infinity).

    Returns:
        (c, d), the layout of ``nn.Linear``.
    """
    values, vectors = torch.linalg.eigh(gram)
    # What rounding leaves of a direction without variance.
    floor = values[-1].detach().clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    there = values > floor
    squares = values.where(there, 1.0)
    factors = (_gains(squares, there, shrinkage, norm) / squares).where(there, 0.0)
    weight: Tensor = (vectors * factors @ (vectors.T @ cross)).T
    return weight


def shrinkage_gains(squares: Tensor, shrinkage: float, norm: Norm = "nuclear") -> Tensor:
    """How much of the truth the best estimate with a bounded bias keeps, along each direction.

    ``argmin_g sum_i g_i^2 / s_i^2`` so that ``||1 - g||_p <= C = shrinkage * ||1||_p``:

    - ``"frobenius"``: ``s^2 / (s^2 + lambda)``, ridge regression;
    - ``"spectral"``: ``1 - C``, least squares times a number;
    - ``"nuclear"``: ``min(1, mu s^2)``: strong directions are not touched, weak ones the more.

    Args:
        squares: ``s^2`` (d), above 0.
        shrinkage: in [0, 1]: 0 is least squares, 1 gives gains of 0.
        norm: of the bias.

    Returns:
        (d), in [0, 1].
    """
    return _gains(squares, torch.ones_like(squares, dtype=torch.bool), shrinkage, norm)


class SchattenShrinkageReadout(ClosedFormReadout):
    """Solves for a linear head with a bounded bias: ridge, or its nuclear and spectral siblings.

    Segert (2023), Flat Minima in Linear Estimation and an Extended Gauss Markov Theorem,
    arXiv:2311.11093.

    Among the linear estimates ``W = (L Y)^T`` of ``Y = X W^T + noise`` whose bias operator is
    bounded, ``||L X - I||_p <= C``, the one with the least variance ``tr(L L^T)`` keeps the gain
    ``g_i`` of the truth along each right singular vector of ``X``: Frobenius ``s^2 / (s^2 +
    lambda)``, which is ridge; spectral ``1 - C``; nuclear ``min(1, mu s^2)``. At the end of an
    epoch the head is set to it, from the features and the targets of the epoch's steps, and its
    bias to the intercept, which nothing shrinks.

    The constraints are the paper's; the gains are derived from them (a convex problem in ``g``
    whose optimality conditions the tests check) and not checked against code, of which none was
    found. ``C`` is given as a share of the bias of the estimate 0, so that one number means the
    same in all norms and dimensions; that is ours, and ``lambda`` and ``mu`` follow from it.

    Args:
        strength: the share of the way from the head's weights to the solution, in [0, 1].
        layer: the name of the head, an ``nn.Linear``.
        features: the submodule whose output (B, d) the head reads, or ``"outputs.<key>"``.
        shrinkage: ``C``, in [0, 1]; 0 is least squares. Choose it by validation.
        norm: ``"nuclear"``, ``"frobenius"`` or ``"spectral"``.
        every: epochs from one solution to the next.
        signals: where ``targets`` are: numbers (B, c) or (B,), or class indices (B,), which are
            taken as one-hot rows; samples with a label below 0 do not count.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, ``layer`` is no linear layer,
            ``features`` is not there, or the rows do not fit the layer.

    Note:
        Over ranks: global; the sums of all ranks are solved, for one all-reduce of ``d (d + c)``
        numbers a micro-batch. Cost: a Gram matrix of the features a micro-batch, and an
        eigendecomposition (d, d) an epoch. The log shows the mean squared residual. A run that
        ends inside an epoch (``max_steps``) leaves the head as it is.

        The head's own gradient steps go on between two solutions; freeze it
        (``requires_grad_(False)``) to leave it to the solution alone. Features are those that the
        steps have seen, with dropout in front of ``features`` and while the encoder trains: it is
        exact for a frozen encoder in evaluation mode. One-hot targets give scores for an argmax,
        not logits whose softmax would be calibrated. It hurts where the head's loss is far from a
        squared one, and where rows are fewer than features and ``shrinkage`` is near 0.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SchattenShrinkageReadout
        >>> readout = SchattenShrinkageReadout(layer="head", features="encoder", shrinkage=0.1)
        >>> trainer = L.Trainer(callbacks=[readout], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Flat Minima in Linear Estimation and an Extended Gauss Markov Theorem",
            "Segert",
            2023,
            "2311.11093",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("features", "targets")
    function: ClassVar[Callable[..., Any] | None] = staticmethod(schatten_shrinkage_readout)
    explanation: ClassVar[str] = "solves for the head in closed form, with a bounded bias"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        layer: str = "head",
        features: str = "encoder",
        shrinkage: float = 0.1,
        norm: Norm = "nuclear",
        every: int = 1,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, layer=layer, every=every, signals=signals, name=name)
        check_range(
            self, "shrinkage", shrinkage, 0, 1, cure="SchattenShrinkageReadout(shrinkage=0.1)"
        )
        if norm not in _NORMS:
            raise ArgumentError(
                self,
                f"`norm` must be one of {', '.join(_NORMS)}, got {norm!r}",
                cure='SchattenShrinkageReadout(norm="nuclear")',
            )
        if not isinstance(features, str) or not features:
            raise ArgumentError(
                self,
                f"`features` must be the name of a submodule, got {features!r}",
                cure='SchattenShrinkageReadout(features="encoder")',
            )
        self.features = features
        self.shrinkage = shrinkage
        self.norm: Norm = norm

    @property
    def layers(self) -> tuple[str, ...]:
        """The submodule to capture."""
        return (self.features,)

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse layers that are not there."""
        super().validate(trainer, pl_module)
        known = [name for name, _ in pl_module.named_modules() if name]
        if not self.features.startswith("outputs.") and self.features not in known:
            raise ArgumentError(
                self,
                f"`features` is {self.features!r}, which this module does not have; it has "
                f"{', '.join(known[:12])}",
                cure=f'SchattenShrinkageReadout(features="{known[0]}")',
            )

    def rows(self, step: Step) -> tuple[Tensor, Tensor]:
        """Features and targets."""
        targets: Tensor = step.targets
        if not targets.is_floating_point():
            labels, classes = targets.flatten(), self.linear(step.module).out_features
            targets = torch.nn.functional.one_hot(labels.clamp_min(0), classes).double()
            targets[labels < 0] = torch.nan
        return step.feature(self.features), targets.reshape(len(targets), -1)

    def solve(self, moments: Moments) -> Tensor:
        """The estimate."""
        return schatten_shrinkage_readout(moments.gram, moments.cross, self.shrinkage, self.norm)


def _gains(squares: Tensor, there: Tensor, shrinkage: float, norm: Norm) -> Tensor:
    """Gains along the directions that are there; along others anything."""
    if norm == "spectral":
        return torch.full_like(squares, 1 - shrinkage)
    if norm == "nuclear":
        return (_mu(squares, there, shrinkage) * squares).clamp_max(1.0)
    return squares / (squares + _lambda(squares, there, shrinkage))


def _mu(squares: Tensor, there: Tensor, shrinkage: float) -> Tensor:
    """``mu`` with ``sum_i max(0, 1 - mu s_i^2) = C``.

    The left side is the largest of ``k - mu (s_1^2 + ... + s_k^2)`` over the k weakest
    directions, so it is at most ``C`` where ``mu`` is at least each ``(k - C) / (s_1^2 + ...)``.
    """
    weakest = squares.where(there, torch.inf).sort().values
    k = torch.arange(1, len(squares) + 1, dtype=squares.dtype, device=squares.device)
    bound = shrinkage * there.sum().to(squares)
    return ((k - bound) / weakest.cumsum(0)).max().clamp_min(0)


def _lambda(squares: Tensor, there: Tensor, shrinkage: float) -> Tensor:
    """``lambda`` with ``sum_i (lambda / (s_i^2 + lambda))^2 = C^2``."""
    if shrinkage in (0, 1):
        return squares.new_tensor(0.0 if shrinkage == 0 else torch.inf)
    goal = shrinkage**2 * there.sum().to(squares)

    def excess(value: Tensor) -> Tensor:
        return (value / (squares + value)).square().where(there, 0.0).sum() - goal

    with torch.no_grad():
        # All directions as weak as the weakest, or as strong as the strongest.
        odds = shrinkage / (1 - shrinkage)
        low = (squares.where(there, torch.inf).min() * odds).log()
        high = (squares.where(there, 0.0).max() * odds).log()
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = excess(middle.exp()) > 0
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        found = high.exp()
        slope = (2 * found * squares / (squares + found) ** 3).where(there, 0.0).sum()
    # A step of Newton's method brings the derivative by `squares`, and the last digits.
    return found - excess(found) / slope
