"""Terms that compare a predicted function with its target on a regular grid.

A technique supplies :meth:`GridPenalty.values`: one number per sample, from predictions and
targets whose last dimensions are the grid. The mechanism takes care of

- finding both, in float32 at least, and checking that they have one shape and a grid;
- the spacing of the grid, one number for all dimensions or one for each;
- adding the value to the user's loss, which may be a plain zero of the network
  (``prediction.sum() * 0``) where this is the only loss;
- the mean over all ranks, each sample counting once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_reg.engine import RegularizationError, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.technique import Semantics


class GridPenalty(Regularizer):
    """Base of terms on functions on a grid.

    Args:
        strength: the multiplier.
        grid_dims: how many of the last dimensions are the grid; what lies between them and the
            batch are channels.
        spacing: the distance of neighbouring grid points: a number, or one per grid dimension.
        signals: where the prediction (``logits``) and ``targets`` are.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"logits", "targets"})
    least_points: ClassVar[int] = 1

    def __init__(
        self,
        strength: float | Schedule,
        *,
        grid_dims: int = 1,
        spacing: float | Sequence[float] = 1.0,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        kind = type(self).__name__
        if not isinstance(grid_dims, int) or isinstance(grid_dims, bool) or grid_dims < 1:
            problem = f"`grid_dims` must be a whole number from 1, got {grid_dims!r}"
            raise ArgumentError(self, problem, cure=f"{kind}(grid_dims=2)")
        one = isinstance(spacing, (int, float))
        steps = [spacing] * grid_dims if one else list(spacing)  # type: ignore[arg-type]
        for step in steps:
            check_range(self, "spacing", step, 0, low_open=True, cure=f"{kind}(spacing=0.01)")  # type: ignore[arg-type]
        if len(steps) != grid_dims:
            problem = f"`spacing` must be a number or one per grid dimension, got {spacing!r}"
            raise ArgumentError(self, problem, cure=f"{kind}(grid_dims={len(steps)})")
        self.grid_dims = grid_dims
        self.spacing = tuple(float(step) for step in steps)  # type: ignore[arg-type]

    @abstractmethod
    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The term (B,) of each sample.

        Args:
            prediction: (B, ..., grid), with a graph.
            target: (B, ..., grid), of the same shape and type.
        """

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        prediction, target = step.logits, step.targets
        if not isinstance(target, Tensor) or target.shape != prediction.shape:
            shape = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise RegularizationError(
                self,
                "compares a prediction with a target of its shape, got "
                f"{tuple(prediction.shape)} and {shape}",
                cure='signals=Signals(logits="module.<name>", targets="batch.<key>")',
            )
        grid = prediction.shape[-self.grid_dims :]
        if prediction.ndim <= self.grid_dims or min(grid) < self.least_points:
            raise RegularizationError(
                self,
                f"needs (B, ..., grid) with {self.grid_dims} grid dimensions of at least "
                f"{self.least_points} points, got {tuple(prediction.shape)}",
                cure=f"{type(self).__name__}(grid_dims=1)",
            )
        return JointMean.of(self.values(prediction, target.to(prediction)))


__all__ = ["GridPenalty"]
