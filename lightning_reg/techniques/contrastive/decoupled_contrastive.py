"""Contrasts two views of a sample with all others, the positive pair left out of the sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.embedding_loss import DEFAULT_VIEWS, EmbeddingLoss

__all__ = ["DecoupledContrastive", "decoupled_contrastive"]


def decoupled_contrastive(
    z1: Tensor, z2: Tensor, temperature: float = 0.1, sigma: float | None = None
) -> Tensor:
    """``L_DC`` of both views, the mean over samples and views.

    For the view k of sample i, with unit vectors and ``s`` their inner product,

    ``L_i^k = -w_i s(z_i^1, z_i^2) / t + log sum_{l, j != i} exp(s(z_i^k, z_j^l) / t)``,

    where the sum runs over both views of all other samples: InfoNCE without the positive pair in
    its denominator. ``w_i`` is 1, or ``2 - e^{s_i / sigma} / mean_j e^{s_j / sigma}`` with
    ``s_i = s(z_i^1, z_i^2)`` (DCLW), through which gradients flow.

    Args:
        z1: (N, d), two rows at least; brought to unit length here.
        z2: (N, d), the other view of each sample.
        temperature: ``t``.
        sigma: of the weights ``w``; ``None`` weights all alike.

    Returns:
        A scalar; it can be negative.
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    positive = (z1 * z2).sum(1)
    scores = torch.cat([z1, z2]) @ torch.cat([z1, z2]).T / temperature
    own = torch.eye(len(z1), dtype=torch.bool, device=z1.device).repeat(2, 2)
    negatives = scores.masked_fill(own, float("-inf")).logsumexp(1)
    weight = 1.0 if sigma is None else 2 - len(z1) * (positive / sigma).softmax(0)
    return negatives.mean() - (weight * positive).mean() / temperature


class DecoupledContrastive(EmbeddingLoss):
    """Contrastive loss without the positive pair in its denominator, for small batches.

    Yeh, Hong, Hsu, Liu, Chen, LeCun (2021), Decoupled Contrastive Learning, arXiv:2110.06848.

    ``L_i = -w_i s_i / t + log sum_{negatives of both views} exp(s / t)``; see
    :func:`decoupled_contrastive`. The gradient of InfoNCE is this one's times ``q_B = 1 - p_i``
    with the softmax probability ``p_i`` of the positive pair: an easy positive, or a small batch,
    makes ``q_B`` vanish and InfoNCE stop learning. Without that factor it goes on.

    The equations are from the abstract and from raminnakhli/Decoupled-Contrastive-Learning@0b9b76d
    (a community code, loss/dcl.py; no code of the authors was found). Defaults from there:
    ``t = 0.1``, ``sigma = 0.5`` for the weighted form. It computes one direction, on vectors that
    the caller has normalized, and masks a sample's own views with about ``e^-103`` instead of
    leaving them out; here both directions are averaged and the mask is exact. Gradients flow
    through the weights as there.

    Args:
        strength: the multiplier.
        temperature: ``t``, above 0.
        sigma: above 0, of the weights of DCLW, which push hard positives more; ``None`` is DCL.
        views: where the two embeddings are; see :class:`EmbeddingLoss`. By default the keys
            ``z1`` and ``z2`` of the dict that ``training_step`` returns.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``temperature`` or ``sigma`` is not above 0, or ``views`` names no place.
        RegularizationError: in the first step, if the views differ in shape or are not (B, d).

    Note:
        Over ranks: global; both views are gathered with gradients first, so that every sample of
        every rank is a negative and a sample's own views are left out wherever they lie. Under
        accumulation negatives come from the micro-batch alone. Cost: one product (2N, d) by
        (d, 2N), on every rank.

        A batch of a single sample counts 0. As the only loss, let ``training_step`` return a zero
        of the network: ``{"loss": 0.0 * z1.sum(), "z1": z1, "z2": z2}``.

        It hurts where a batch holds several samples of one class that belongs together: they
        are negatives of each other.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import DecoupledContrastive
        >>> trainer = L.Trainer(callbacks=[DecoupledContrastive(views="projector")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Decoupled Contrastive Learning", "Yeh et al.", 2021, "2110.06848"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(decoupled_contrastive)
    explanation: ClassVar[str] = "contrasts two views with the samples of all ranks"
    exemptions = {"accumulation": "negatives come from the micro-batch alone"}

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        temperature: float = 0.1,
        sigma: float | None = None,
        views: str | Sequence[str] = DEFAULT_VIEWS,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, views=views, name=name)
        cure = "DecoupledContrastive(temperature=0.1)"
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        if sigma is not None:
            cure = "DecoupledContrastive(sigma=0.5)"
            check_range(self, "sigma", sigma, 0, low_open=True, cure=cure)
        self.temperature = temperature
        self.sigma = sigma

    def value(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of all samples."""
        return decoupled_contrastive(z1, z2, self.temperature, self.sigma)
