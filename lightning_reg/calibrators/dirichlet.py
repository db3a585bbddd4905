"""Maps log-probabilities by a matrix: calibration for Dirichlet-distributed predictions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_reg.calibrators.matrix import MatrixScaling
from lightning_reg.engine.paper import Paper

__all__ = ["DirichletCalibration"]


class DirichletCalibration(MatrixScaling):
    """Maps log-probabilities by a matrix: right if each class's predictions are Dirichlet.

    Kull, Perello-Nieto, Kaengsepp, Silva Filho, Song, Flach (2019), Beyond temperature scaling:
    Obtaining well-calibrated multiclass probabilities with Dirichlet calibration, arXiv:1910.12656.

    ``softmax(W log p + b)`` with ``p = softmax(z)``, at the minimum of the mean cross-entropy plus
    the off-diagonal and intercept regularization ``lambda / (k (k - 1)) sum_{i != j} w_ij^2 +
    mu / k sum_i b_i^2``. ``log p`` comes from the logits and is never clipped; the released code
    clips ``p``. Where that code differs from the paper's formula the paper is followed: see
    :class:`MatrixScaling`, which is the same map on logits. The defaults 1e-3 are ours; the paper
    cross-validates both.

    Args:
        off_diagonal: ``lambda``, at least 0.
        bias: ``mu``, at least 0.
        task: ``"multiclass"``; for a binary task the same idea is :class:`BetaCalibration`.
        ignore_index: positions with this label are left out of the fit.
        class_dim: the dimension of the classes: -1 for token logits (B, T, C).

    Note:
        Over ranks, cost, memory and harm: as those of :class:`MatrixScaling`.

    Example:
        >>> import torch
        >>> from lightning_reg import DirichletCalibration
        >>> logits, labels = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 2]).repeat(4)
        >>> DirichletCalibration().fit(logits, labels).calibrate(logits).shape
        torch.Size([12, 3])
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Beyond temperature scaling: Obtaining well-calibrated multiclass probabilities with "
            "Dirichlet calibration",
            "Kull et al.",
            2019,
            "1910.12656",
        ),
    )

    def features(self, scores: Tensor) -> Tensor:
        """Log-probabilities."""
        return scores.log_softmax(1)
