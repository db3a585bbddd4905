"""Compares slopes of a predicted function with those of its target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.grid_penalty import GridPenalty

__all__ = ["H1SeminormLoss", "h1_seminorm_loss"]


def h1_seminorm_loss(
    prediction: Tensor,
    target: Tensor,
    spacing: float | Sequence[float],
    gamma: float = 0.1,
    data_weight: float = 1.0,
    periodic: bool = False,
    root: bool = False,
) -> Tensor:
    """``w ||u - v||^2 / ||u||^2 + gamma h ||D_h u - D_h v||^2 / ||D_h u||^2`` of each sample.

    ``D_h`` is the central difference ``(u_{i+1} - u_{i-1}) / 2h`` in every grid dimension, at the
    points that have both neighbours; ``h`` in front is the largest spacing.

    Args:
        prediction: ``v`` (B, ..., grid).
        target: ``u``, of the same shape; a target that is 0 everywhere, or constant, has no
            relative error: the norm is then taken as the smallest positive number.
        spacing: ``h``, a number for a grid of one dimension, or one per grid dimension.
        gamma: the weight of the slopes.
        data_weight: ``w``, of the values; 0 leaves the slopes alone.
        periodic: whether the last point's neighbour is the first.
        root: take the square root of both terms, weights included.

    Returns:
        (B,), without a unit.
    """
    steps = [float(spacing)] if isinstance(spacing, (int, float)) else list(spacing)
    error = prediction - target
    values = _ratio(_energy(error), _energy(target))
    slopes = _ratio(_slope_energy(error, steps, periodic), _slope_energy(target, steps, periodic))
    terms = data_weight * values, gamma * max(steps) * slopes
    return _root(terms[0]) + _root(terms[1]) if root else terms[0] + terms[1]


class H1SeminormLoss(GridPenalty):
    """Makes a network that predicts a function on a grid get its slopes right as well.

    Cao (2021), Choose a Transformer: Fourier or Galerkin, arXiv:2105.14995.

    The loss of a sample is ``w ||u - v||^2 / ||u||^2 + gamma h ||D_h u - D_h v||^2 /
    ||D_h u||^2``: relative errors of the values and of the central differences, the ratio
    taken per sample before the mean, so that functions of small size count as much as others. The
    second term is the H1 seminorm. It comes on top of your own loss (``data_weight=0`` adds the
    slopes alone); as the only loss, let ``training_step`` return ``prediction.sum() * 0``.

    Confirmed against scaomath/galerkin-transformer (``libs/ft.py``, ``WeightedL2Loss``), where
    ``gamma`` is 0.1 as here and ``root=True`` is the default. Three things are as in the formula
    and not as there: the slopes of the target come from the same central difference and the same
    points as those of the prediction, while that code gets them from the data set, at all points;
    in two dimensions it divides by twice ``||D_h u||^2``; and there a network's derivative may be
    compared besides.

    Args:
        strength: the multiplier.
        gamma: the weight of the slopes.
        spacing: ``h``: a number, or one per grid dimension.
        grid_dims: how many of the last dimensions are the grid.
        data_weight: the weight of the values.
        periodic: whether the last point's neighbour is the first.
        root: take the square root of both terms, weights included, as the code does. Its gradient
            does not vanish with the error.
        signals: where the prediction (``logits``) and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if shapes differ, or a grid dimension has fewer
            than three points.

    Note:
        Over ranks: global; the mean runs over the samples of all ranks. Cost: a few passes over
        the predictions. Differences raise noise: where targets are noisy it learns the noise's
        slopes, more so on finer grids.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import H1SeminormLoss
        >>> trainer = L.Trainer(callbacks=[H1SeminormLoss(spacing=1 / 512)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Choose a Transformer: Fourier or Galerkin", "Cao", 2021, "2105.14995"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(h1_seminorm_loss)
    explanation: ClassVar[str] = "adds relative errors of values and slopes on the grid"
    least_points = 3

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        gamma: float = 0.1,
        spacing: float | Sequence[float] = 1.0,
        grid_dims: int = 1,
        data_weight: float = 1.0,
        periodic: bool = False,
        root: bool = False,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, grid_dims=grid_dims, spacing=spacing, signals=signals, name=name)
        check_range(self, "gamma", gamma, 0, cure="H1SeminormLoss(gamma=0.1)")
        check_range(self, "data_weight", data_weight, 0, cure="H1SeminormLoss(data_weight=1.0)")
        self.gamma = gamma
        self.data_weight = data_weight
        self.periodic = periodic
        self.root = root

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each sample."""
        return h1_seminorm_loss(
            prediction,
            target,
            self.spacing,
            self.gamma,
            self.data_weight,
            self.periodic,
            self.root,
        )


def _energy(function: Tensor) -> Tensor:
    return function.flatten(1).square().mean(1)


def _slope_energy(function: Tensor, steps: Sequence[float], periodic: bool) -> Tensor:
    total = torch.zeros((), device=function.device)
    for position, step in enumerate(steps):
        dim = position - len(steps)
        if periodic:
            difference = function.roll(-1, dim) - function.roll(1, dim)
        else:
            count = function.shape[dim] - 2
            difference = function.narrow(dim, 2, count) - function.narrow(dim, 0, count)
        total = total + _energy(difference / (2 * step))
    return total


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    return error / size.clamp_min(torch.finfo(size.dtype).tiny)


def _root(term: Tensor) -> Tensor:
    # A root has no gradient at 0: an exact prediction passes none.
    positive = term > 0
    return torch.where(positive, term.where(positive, term.new_ones(())).sqrt(), 0.0 * term)
