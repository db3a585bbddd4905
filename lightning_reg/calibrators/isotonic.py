"""Maps a probability by the best non-decreasing step function."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_reg.calibrators.calibrator import logit
from lightning_reg.calibrators.one_vs_rest import OneVsRest
from lightning_reg.engine.optional import require
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.inputs import Task

__all__ = ["IsotonicCalibration"]


class IsotonicCalibration(OneVsRest):
    """Maps a probability by the best non-decreasing function of it.

    Zadrozny, Elkan (2002), Transforming classifier scores into accurate multiclass probability
    estimates (KDD).

    The non-decreasing ``q`` with the least squared error on held-out data (pool adjacent
    violators), which is also the one of largest likelihood; scikit-learn fits it, and what it
    keeps is interpolated between the held-out scores as it does, and constant beyond them. For
    several classes, each against the others, divided by the sum (all zero: uniform), as in the
    paper.

    Args:
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: positions with this label are left out of the fit.
        class_dim: the dimension of the classes: -1 for token logits (B, T, C).

    Note:
        Over ranks: the held-out logits are gathered once, to every rank, in float64; every rank
        ends with rank 0's result, which does not depend on the number of ranks. Cost: a sort per
        class. Needs scikit-learn for the fit, and nothing afterwards:
        ``pip install "lightning_reg[calibration]"``.

        It hurts with fewer than about a thousand held-out samples per class, where steps follow
        the noise; within a step predictions are equal, and the predicted class can change.
        Probabilities of 0 stay 2^-52 away from it.

    Example:
        >>> import torch
        >>> from lightning_reg import IsotonicCalibration
        >>> logits, labels = torch.tensor([3.0, 2.0, 1.0, -1.0]), torch.tensor([0, 1, 1, 0])
        >>> IsotonicCalibration(task="binary").fit(logits, labels).probabilities(logits[:1])
        tensor([0.6667])
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Transforming classifier scores into accurate multiclass probability estimates",
            "Zadrozny and Elkan",
            2002,
            None,
        ),
    )
    knots: Tensor
    values: Tensor

    def __init__(
        self, *, task: Task = "multiclass", ignore_index: int | None = None, class_dim: int = 1
    ) -> None:
        super().__init__(task=task, ignore_index=ignore_index, class_dim=class_dim)
        # (C, K) each.
        self.register_buffer("knots", torch.zeros(1, 1, dtype=torch.float64))
        self.register_buffer("values", torch.zeros(1, 1, dtype=torch.float64))

    def solve_column(self, log_odds: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Pool adjacent violators."""
        isotonic = require("sklearn.isotonic", "calibration", type(self).__name__)
        model = isotonic.IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
        model.fit(log_odds.sigmoid().cpu().numpy(), targets.cpu().numpy())
        return {
            "knots": torch.from_numpy(model.X_thresholds_).to(log_odds),
            "values": torch.from_numpy(model.y_thresholds_).to(log_odds),
        }

    def map_column(self, log_odds: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        """Interpolate between the knots."""
        return logit(_interpolate(log_odds.sigmoid(), numbers["knots"], numbers["values"]))


def _interpolate(p: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Linear between knots, constant beyond them; repeated last knots are padding."""
    right = torch.searchsorted(knots.contiguous(), p.contiguous()).clamp(0, len(knots) - 1)
    left = (right - 1).clamp_min(0)
    width = knots[right] - knots[left]
    share = ((p - knots[left]) / width.where(width > 0, torch.ones_like(width))).clamp(0, 1)
    return values[left] + share * (values[right] - values[left])
