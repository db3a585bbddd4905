"""Two views of a sample agree, while every dimension varies and no two dimensions say the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.embedding_loss import DEFAULT_VIEWS, EmbeddingLoss

__all__ = ["VICReg", "vicreg"]


def vicreg(
    z1: Tensor,
    z2: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """``lambda s(Z, Z') + mu (v(Z) + v(Z')) / 2 + nu (c(Z) + c(Z'))``.

    - ``s``: the mean over all entries of ``(Z - Z')^2``;
    - ``v(Z) = mean_j max(0, gamma - sqrt(Var(Z_j) + eps))``, unbiased variance over samples;
    - ``c(Z) = 1/d sum_{i != j} C(Z)_ij^2`` with the unbiased covariance ``C(Z)``.

    Args:
        z1: ``Z``, (N, d), two rows at least.
        z2: ``Z'``, (N, d), the other view of each sample.
        invariance: ``lambda``.
        variance: ``mu``.
        covariance: ``nu``.
        gamma: the standard deviation that every dimension should have.
        eps: keeps the square root's gradient finite in a collapsed dimension.

    Returns:
        A scalar, at least 0.
    """
    apart = F.mse_loss(z1, z2)
    spread = (_collapse(z1, gamma, eps) + _collapse(z2, gamma, eps)) / 2
    shared = _redundancy(z1) + _redundancy(z2)
    return invariance * apart + variance * spread + covariance * shared


def _collapse(z: Tensor, gamma: float, eps: float) -> Tensor:
    deviation = torch.sqrt(z.var(0) + eps)
    return F.relu(gamma - deviation).mean()


def _redundancy(z: Tensor) -> Tensor:
    centred = z - z.mean(0)
    matrix = centred.T @ centred / (len(z) - 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / z.shape[1]


class VICReg(EmbeddingLoss):
    """Pulls two views of a sample together and keeps embeddings from collapsing, without negatives.

    Bardes, Ponce, LeCun (2021), VICReg: Variance-Invariance-Covariance Regularization for
    Self-Supervised Learning, arXiv:2105.04906.

    ``lambda s(Z, Z') + mu (v(Z) + v(Z')) / 2 + nu (c(Z) + c(Z'))`` with the mean squared distance
    ``s`` of the views, the hinge ``v`` on the standard deviation of each dimension and the squared
    off-diagonal covariances ``c``, divided by the width d; see :func:`vicreg`.

    Confirmed against facebookresearch/vicreg@4e12602, main_vicreg.py, defaults included: lambda =
    mu = 25, nu = 1, eps = 1e-4. As there, and unlike in the paper's equation, the variance term is
    averaged over the two views; other libraries sum it. The code takes the invariance term of
    each rank's own rows, which is the same mean when ranks hold equally many.

    Args:
        strength: the multiplier of the whole.
        invariance: ``lambda``.
        variance: ``mu``.
        covariance: ``nu``.
        gamma: the standard deviation below which a dimension is pushed apart.
        views: where the two embeddings are; see :class:`EmbeddingLoss`. By default the keys
            ``z1`` and ``z2`` of the dict that ``training_step`` returns.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if a coefficient is negative, or ``views`` names no place.
        RegularizationError: in the first step, if the views differ in shape or are not (B, d).

    Note:
        Over ranks: global; both views are gathered with gradients first, 2 N d numbers a step.
        Under accumulation each micro-batch has its own variances and covariances, so the batch
        that counts is the micro-batch. Cost: two products (d, N) by (N, d).

        A batch of a single sample counts 0. As the only loss, let ``training_step`` return a zero
        of the network: ``{"loss": 0.0 * z1.sum(), "z1": z1, "z2": z2}``.

        It hurts with few samples a batch: N below d leaves a covariance of rank N - 1, which
        cannot be made diagonal.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import VICReg
        >>> trainer = L.Trainer(callbacks=[VICReg(views="projector")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
            "Bardes et al.",
            2021,
            "2105.04906",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(vicreg)
    explanation: ClassVar[str] = "pulls views together and decorrelates their dimensions"
    exemptions = {"accumulation": "each micro-batch has its own variances and covariances"}

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        gamma: float = 1.0,
        views: str | Sequence[str] = DEFAULT_VIEWS,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, views=views, name=name)
        given = {"invariance": invariance, "variance": variance, "covariance": covariance}
        for key, value in given.items():
            check_range(self, key, value, 0, cure="VICReg(invariance=25, variance=25)")
        check_range(self, "gamma", gamma, 0, low_open=True, cure="VICReg(gamma=1.0)")
        self.invariance, self.variance, self.covariance = invariance, variance, covariance
        self.gamma = gamma

    def value(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of all samples."""
        return vicreg(z1, z2, self.invariance, self.variance, self.covariance, self.gamma)
