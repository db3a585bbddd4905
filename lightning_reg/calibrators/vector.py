"""Gives each class a factor and an offset of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_reg.calibrators.calibrator import GatheredCalibrator, one_hot
from lightning_reg.calibrators.linear import best_scale, cross_entropy, minimize
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.inputs import Task

__all__ = ["VectorScaling"]


class VectorScaling(GatheredCalibrator):
    """Gives each class a factor and an offset of its own.

    Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, arXiv:1706.04599.

    ``softmax(w * z + b)`` with ``w``, ``b`` (C,) at the minimum of the held-out negative
    log-likelihood, which is convex; ``b`` has mean zero, since a common offset changes nothing. For
    a binary task it is ``sigmoid(w z + b)``: Platt scaling, without his smoothed labels. The fit is
    SciPy's L-BFGS-B in float64, started at the best temperature.

    The predicted class can change. Where classes are separable, factors grow until the
    likelihood no longer does.

    Args:
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: positions with this label are left out of the fit.
        class_dim: the dimension of the classes: -1 for token logits (B, T, C).

    Note:
        Over ranks: the held-out logits are gathered once, to every rank, in float64; every rank
        ends with rank 0's result, which does not depend on the number of ranks. Cost: a few dozen
        passes over the logits. Needs SciPy for the fit:
        ``pip install "lightning_reg[calibration]"``.

        It hurts with few held-out samples per class: 2 C numbers are fitted.

    Example:
        >>> import torch
        >>> from lightning_reg import VectorScaling
        >>> logits, labels = torch.tensor([8.0, 8.0, -8.0, -8.0]), torch.tensor([1, 0, 0, 1])
        >>> VectorScaling(task="binary").fit(logits, labels).probabilities(logits[:1])
        tensor([0.5000])
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("On Calibration of Modern Neural Networks", "Guo et al.", 2017, "1706.04599"),
    )
    weight: Tensor
    bias: Tensor

    def __init__(
        self, *, task: Task = "multiclass", ignore_index: int | None = None, class_dim: int = 1
    ) -> None:
        super().__init__(task=task, ignore_index=ignore_index, class_dim=class_dim)
        self.register_buffer("weight", torch.ones(1, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(1, dtype=torch.float64))

    def solve(self, scores: Tensor, targets: Tensor) -> None:
        """L-BFGS on factors and offsets."""
        self._check_finite(scores)
        scale = best_scale(self, scores, targets)
        x = scores.unsqueeze(1) * scale if self.task == "binary" else scores * scale
        distribution = _two_classes(targets) if self.task == "binary" else one_hot(targets, scores)
        classes = x.shape[1]

        def objective(parameters: Tensor) -> tuple[Tensor, Tensor]:
            w, b = parameters[:classes], parameters[classes:]
            value, by_output = cross_entropy(_outputs(x * w + b), distribution)
            by_output = by_output[:, -classes:]
            return value, torch.cat([(by_output * x).sum(0), by_output.sum(0)])

        found = minimize(self, objective, torch.cat([x.new_ones(classes), x.new_zeros(classes)]))
        self.weight = (found[:classes] * scale).to(self.weight)
        # Gradients by the offsets sum to 0 over classes, so the offsets keep their sum of 0.
        self.bias = found[classes:].to(self.bias)

    def map_rows(self, scores: Tensor) -> Tensor:
        """``w * z + b``."""
        self._check_finite(scores)
        return scores * self.weight.to(scores) + self.bias.to(scores)


def _outputs(rows: Tensor) -> Tensor:
    """Two classes (0, z) for one column of logits."""
    return rows if rows.shape[1] > 1 else torch.cat([torch.zeros_like(rows), rows], 1)


def _two_classes(targets: Tensor) -> Tensor:
    positive = targets.double()
    return torch.stack([1 - positive, positive], 1)
