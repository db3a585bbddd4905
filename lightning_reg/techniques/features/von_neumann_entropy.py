"""Spreads (or concentrates) the eigenvalues of a representation's autocorrelation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule
from lightning_reg.mechanisms.feature_penalty import FeaturePenalty, Pooling

__all__ = ["VonNeumannEntropy", "von_neumann_entropy"]


def von_neumann_entropy(features: Tensor) -> Tensor:
    """``S = -sum_j l_j log l_j`` of the eigenvalues of the autocorrelation, in nats.

    ``C = (1/N) sum_i h_i h_i^T`` of rows ``h_i`` of length 1, not centred, so that its trace is 1
    and ``0 <= S <= log min(N, d)``; ``exp(S)`` is an effective rank. A row of zeros has no
    direction: it adds nothing to the sum and gets no gradient.

    The eigenvalues are taken of the smaller one of ``C`` (d, d) and the Gram matrix (N, N), which
    share all that are not 0. An eigenvalue of 0 within rounding adds nothing and passes no
    gradient: that is the limit of both, ``d(s^2 log s^2)/ds -> 0`` for a singular value ``s``,
    where the logarithm of an eigenvalue that is exactly 0 would give NaN.

    Args:
        features: (N, d), of any length per row; float32 or float64.

    Returns:
        A scalar; NaN if a feature is not finite.
    """
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    rows = features / norm.masked_fill(norm == 0, torch.inf)
    matrix = (rows if rows.shape[0] < rows.shape[1] else rows.T) / max(rows.shape[0], 1) ** 0.5
    correlation = matrix @ matrix.T
    # A NaN would make the eigenvalue solver raise; it has to come out as a NaN.
    finite = correlation.isfinite()
    poison = torch.where(finite.all(), 0.0, torch.nan)
    eigenvalues = torch.linalg.eigvalsh(correlation.masked_fill(~finite, 0.0))
    rounding = torch.finfo(eigenvalues.dtype).eps
    # log 1 = 0 stands in for the eigenvalues that are left out.
    positive = eigenvalues.masked_fill(eigenvalues <= rounding, 1.0)
    entropy: Tensor = poison - (positive * positive.log()).sum()
    return entropy


class VonNeumannEntropy(FeaturePenalty):
    """Raises the entropy of a representation's spectrum, so that it uses more directions.

    Kim, Kang, Hwang, Shin, Rhee (2023), VNE: An Effective Method for Improving Deep
    Representation by Manipulating Eigenvalue Distribution, arXiv:2304.01434.

    The loss becomes ``L - alpha S`` with ``S = -sum_j l_j log l_j`` in nats, over the eigenvalues
    of ``C = (1/N) sum_i h_i h_i^T`` of the features ``h_i``, each scaled to length 1 (trace 1; not
    centred). ``alpha > 0`` (VNE+) spreads the eigenvalues: more rank, less correlation; ``alpha <
    0`` (VNE-) concentrates them. The log shows ``-S``.

    Values and gradients are those of jaeill/CVPR23-VNE (``vne/__init__.py``). Where a singular
    value is exactly 0 (two equal samples, a dead unit) the gradient there is NaN; here it is the
    finite limit. That repository recommends batches of 32 or more and ``|alpha|`` far below 0.5;
    the default 0.01 is ours.

    Args:
        strength: ``alpha``; negative to concentrate.
        layer: the submodule whose output is the representation; ``None`` under manual
            optimization, where ``self.regularize(loss, features=...)`` hands it over.
        pooling: how feature maps and sequences become rows: ``"mean"``, ``"flatten"``,
            ``"positions"`` or ``"first"``.
        feature_dim: where the features lie in outputs of more than two dimensions; by default
            last of three (B, T, d) and second of more (B, d, H, W).
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``pooling`` is none of the four, or the module has no such layer.

    Note:
        Over ranks: global. Rows of all ranks are gathered with gradients, as the entropy of a
        shard is bounded by the logarithm of its own size: N ranks equal one process with the
        joint batch, in value and gradient. Under accumulation each micro-batch has a spectrum
        of its own: the method is not that of the joined batch, and small micro-batches cap ``S``.

        Cost: a product of the features with themselves and the eigenvalues of a matrix of
        ``m = min(N, d)`` rows, of order ``m^3``, on every rank; one gather of the features.
        It hurts if ``alpha`` is so large that it spreads noise: classes are meant to share
        directions.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import VonNeumannEntropy
        >>> spread = VonNeumannEntropy(0.01, layer="encoder")
        >>> trainer = L.Trainer(callbacks=[spread], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "VNE: An Effective Method for Improving Deep Representation by Manipulating "
            "Eigenvalue Distribution",
            "Kim et al.",
            2023,
            "2304.01434",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "the spectrum of a batch is not the mean of its micro-batches' spectra",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(von_neumann_entropy)
    explanation: ClassVar[str] = "spreads the eigenvalues of the features of all ranks' samples"

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        layer: str | None = None,
        pooling: Pooling = "mean",
        feature_dim: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, layer=layer, pooling=pooling, feature_dim=feature_dim, name=name)

    def value(self, features: Tensor) -> Tensor:
        """The negative entropy."""
        return -von_neumann_entropy(features)
