"""Weights each query of InfoNCE by how far it is from finding its positive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule
from lightning_reg.mechanisms.embedding_loss import DEFAULT_VIEWS
from lightning_reg.mechanisms.info_nce import QueryLoss, focused, info_nce

__all__ = ["FocalInfoNCE", "focal_info_nce"]


def focal_info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float = 0.05,
    gamma: float = 0.5,
) -> Tensor:
    """``(1 - p_i)^gamma (-log p_i)`` of each query, the first factor without a gradient.

    ``p_i = e^{s(q_i, p_i) / t} / Z_i`` is the probability that the query gives its positive; the
    positives of other queries and all hard negatives stand in ``Z_i``, and ``s`` is the cosine.

    Args:
        queries: ``q``, (N, d), of any length.
        positives: ``p``, (N, d).
        negatives: (N, M, d) hard negatives of the queries; ``None`` without any.
        temperature: ``t``, above 0.
        gamma: at least 0; 0 is InfoNCE.

    Returns:
        (N,), in nats, at least 0.
    """
    return focused(info_nce(queries, positives, temperature, negatives=negatives), gamma)


class FocalInfoNCE(QueryLoss):
    """InfoNCE that concentrates on the queries which do not find their positive yet.

    Zhao, Hu, Shan, Huang, Zhou, Zhang, Sun, Liu, Li, Wei, Pan, Xiang, Zhang, Wang, Yu, Hu, Zhang
    (2025), KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding
    Model, arXiv:2506.20923.

    ``L = 1/N sum_i w_i L_i`` with InfoNCE's ``L_i = -log p_i`` and ``w_i = (1 - p_i)^gamma``; see
    :func:`focal_info_nce`. The weight takes no gradient: through it, the loss would be another
    one, whose minimum an easy query is pushed to from both sides. Weights are not normalized, so
    that the loss falls faster than InfoNCE as queries become easy.

    Formula from the paper as remembered, not checked against code, of which none is published;
    ``gamma = 0.5`` is the paper's by the accounts of others. The temperature is ours.

    Args:
        strength: the multiplier.
        gamma: at least 0; 0 is InfoNCE.
        temperature: ``t``, above 0.
        views: where queries and positives (B, d) are; see :class:`TwoViews`. By default the keys
            ``z1`` and ``z2`` of the dict that ``training_step`` returns.
        negatives: where hard negatives (B, M, d) are, a key of the returned dict
            (``"outputs.negatives"``) or a submodule; ``None`` without any.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``gamma`` is below 0, ``temperature`` not above 0, or a place is none.
        RegularizationError: in the first step, if shapes are not these.

    Note:
        Over ranks: global; positives and hard negatives of all ranks are gathered with gradients,
        and each rank scores its own queries. Under accumulation negatives come from the
        micro-batch alone. Cost: one product (B, d) by (d, N (1 + M)).

        As the only loss, let ``training_step`` return a zero of the network:
        ``{"loss": 0.0 * z1.sum(), "z1": z1, "z2": z2}``. To mix hard negatives as well, use
        :class:`OnlineHardNegativeMixing` with its ``gamma``, not both.

        It hurts where pairs are mislabeled: they stay hard, and get the largest weights.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import FocalInfoNCE
        >>> trainer = L.Trainer(callbacks=[FocalInfoNCE(gamma=0.5)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile "
            "Embedding Model",
            "Zhao et al.",
            2025,
            "2506.20923",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(focal_info_nce)
    explanation: ClassVar[str] = "contrasts queries with all positives, hard queries the most"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        gamma: float = 0.5,
        temperature: float = 0.05,
        views: str | Sequence[str] = DEFAULT_VIEWS,
        negatives: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            temperature=temperature,
            gamma=gamma,
            views=views,
            negatives=negatives,
            name=name,
        )
