"""Maps logits by a full matrix that is held near a diagonal one."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_reg.calibrators.calibrator import GatheredCalibrator
from lightning_reg.calibrators.linear import fit_matrix
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.inputs import Task

__all__ = ["MatrixScaling"]


class MatrixScaling(GatheredCalibrator):
    """Maps logits by a full matrix that is held near a diagonal one (ODIR).

    Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks,
    arXiv:1706.04599; Kull, Perello-Nieto, Kaengsepp, Silva Filho, Song, Flach (2019), Beyond
    temperature scaling: Obtaining well-calibrated multiclass probabilities with Dirichlet
    calibration, arXiv:1910.12656.

    ``softmax(W z + b)`` at the minimum of the mean cross-entropy plus ``lambda / (k (k - 1))
    sum_{i != j} w_ij^2 + mu / k sum_i b_i^2``: the off-diagonal and intercept regularization, as
    the paper writes it. The released code (dirichletcal/dirichlet_python, calib/multinomial.py)
    has these factors with ``reg_norm=True``; by default it also subtracts the last row of the
    parameters before it penalizes them, which makes the result depend on the order of classes,
    and is not done here. The paper chooses ``lambda`` and ``mu`` by cross-validation; the defaults
    1e-3 are ours. The problem is convex, and the minimum unique for ``lambda, mu > 0``.

    Args:
        off_diagonal: ``lambda``, at least 0.
        bias: ``mu``, at least 0.
        task: ``"multiclass"``; for a binary task :class:`VectorScaling` is the same map.
        ignore_index: positions with this label are left out of the fit.
        class_dim: the dimension of the classes: -1 for token logits (B, T, C).

    Note:
        Over ranks: the held-out logits are gathered once, to every rank, in float64; every rank
        ends with rank 0's result, which does not depend on the number of ranks. Cost: some hundred
        products of logits (N, C) with a matrix (C, C). Needs SciPy for the fit:
        ``pip install "lightning_reg[calibration]"``.

        It hurts with many classes: C^2 numbers are fitted, and the predicted class can change.

    Example:
        >>> import torch
        >>> from lightning_reg import MatrixScaling
        >>> logits, labels = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 2]).repeat(4)
        >>> MatrixScaling(off_diagonal=0.1).fit(logits, labels).calibrate(logits).shape
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
        Paper("On Calibration of Modern Neural Networks", "Guo et al.", 2017, "1706.04599"),
    )
    tasks: ClassVar[tuple[Task, ...]] = ("multiclass",)
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        off_diagonal: float = 1e-3,
        bias: float = 1e-3,
        *,
        task: Task = "multiclass",
        ignore_index: int | None = None,
        class_dim: int = 1,
    ) -> None:
        super().__init__(task=task, ignore_index=ignore_index, class_dim=class_dim)
        cure = f"{type(self).__name__}(off_diagonal=1e-3, bias=1e-3)"
        check_range(self, "off_diagonal", off_diagonal, 0, cure=cure)
        check_range(self, "bias", bias, 0, cure=cure)
        self.off_diagonal_strength = off_diagonal
        self.bias_strength = bias
        self.register_buffer("weight", torch.ones(1, 1, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(1, dtype=torch.float64))

    def features(self, scores: Tensor) -> Tensor:
        """What the matrix is applied to."""
        return scores

    def solve(self, scores: Tensor, targets: Tensor) -> None:
        """L-BFGS on the matrix and the offsets."""
        self._check_finite(scores)
        weight, bias = fit_matrix(
            self, self.features(scores), targets, self.off_diagonal_strength, self.bias_strength
        )
        self.weight, self.bias = weight.to(self.weight), bias.to(self.bias)

    def map_rows(self, scores: Tensor) -> Tensor:
        """``W x + b``."""
        self._check_finite(scores)
        return self.features(scores) @ self.weight.to(scores).T + self.bias.to(scores)
