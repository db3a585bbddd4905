"""Maps a probability by the curve that is right for beta-distributed scores."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from lightning_reg.calibrators.linear import minimize
from lightning_reg.calibrators.one_vs_rest import OneVsRest
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.inputs import Task

__all__ = ["BetaCalibration"]


class BetaCalibration(OneVsRest):
    """Maps a probability by the curve that is right for beta-distributed scores.

    Kull, Silva Filho, Flach (2017), Beta calibration: a well-founded and easily implemented
    improvement on logistic calibration for binary classifiers (AISTATS).

    ``logit q = a log p - b log(1 - p) + c`` with ``a, b >= 0``, at the minimum of the held-out
    negative log-likelihood. ``a = b = 1, c = 0`` is the identity, which logistic (Platt) scaling
    of a probability does not contain. For several classes, each against the others, divided by
    the sum. ``log p`` and ``log(1 - p)`` come from the logits and are exact where ``p`` rounds to
    1.

    The released code (betacal/python, beta_calibration.py) drops ``a`` or ``b`` and fits again if
    it comes out negative, which can leave the other one negative; here both are bounded in one
    fit, so the result is the constrained minimum. It also clips ``p`` to 2^-52 from 0 and 1.

    Args:
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: positions with this label are left out of the fit.
        class_dim: the dimension of the classes: -1 for token logits (B, T, C).

    Note:
        Over ranks: the held-out logits are gathered once, to every rank, in float64; every rank
        ends with rank 0's result, which does not depend on the number of ranks. Cost: three
        numbers per class, a few dozen passes each. Needs SciPy for the fit:
        ``pip install "lightning_reg[calibration]"``.

        It hurts where few samples belong to a class, and for many classes: one against the rest
        says nothing of how the others are shared.

    Example:
        >>> import torch
        >>> from lightning_reg import BetaCalibration
        >>> logits, labels = torch.tensor([3.0, 3.0, -3.0, -3.0]), torch.tensor([1, 0, 0, 1])
        >>> BetaCalibration(task="binary").fit(logits, labels).probabilities(logits[:1])
        tensor([0.5000])
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Beta calibration: a well-founded and easily implemented improvement on logistic "
            "calibration for binary classifiers",
            "Kull et al.",
            2017,
            None,
        ),
    )
    coefficients: Tensor

    def __init__(
        self, *, task: Task = "multiclass", ignore_index: int | None = None, class_dim: int = 1
    ) -> None:
        super().__init__(task=task, ignore_index=ignore_index, class_dim=class_dim)
        # (C, 3): a, b, c.
        self.register_buffer("coefficients", torch.ones(1, 3, dtype=torch.float64))

    def solve_column(self, log_odds: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Bounded L-BFGS on a, b and c, with features of one size."""
        self._check_finite(log_odds)
        features = _features(log_odds)
        scale = features.abs().amax(0).clamp_min(1e-300)
        x = torch.cat([features / scale, torch.ones_like(features[:, :1])], 1)

        def objective(parameters: Tensor) -> tuple[Tensor, Tensor]:
            scores = x @ parameters
            value = binary_cross_entropy_with_logits(scores, targets)
            return value, x.T @ (scores.sigmoid() - targets) / len(x)

        start = torch.cat([scale, scale.new_zeros(1)]).clamp_max(10.0)
        found = minimize(self, objective, start, [(0, None), (0, None), (None, None)])
        return {"coefficients": torch.cat([found[:2] / scale, found[2:]])}

    def map_column(self, log_odds: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        """``a log p - b log(1 - p) + c``."""
        a, b, c = numbers["coefficients"].unbind()
        first, second = _features(log_odds).unbind(1)
        return a * first + b * second + c


def _features(log_odds: Tensor) -> Tensor:
    """``log p`` and ``-log(1 - p)``."""
    return torch.stack([logsigmoid(log_odds), -logsigmoid(-log_odds)], 1)
