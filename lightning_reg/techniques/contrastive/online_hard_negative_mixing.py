"""Mixes the hardest negatives of each query into new ones that are harder still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Schedule, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.batch_transform import draw_beta
from lightning_reg.mechanisms.embedding_loss import DEFAULT_VIEWS
from lightning_reg.mechanisms.info_nce import QueryLoss

__all__ = ["OnlineHardNegativeMixing", "mix_hard_negatives"]


def mix_hard_negatives(
    queries: Tensor,
    candidates: Tensor,
    pairs: Tensor,
    shares: Tensor,
    temperature: float = 0.05,
    list_wise: bool = True,
) -> Tensor:
    """Unit vectors between the negatives of each query.

    With a query's candidates ``h_1, h_2, ...`` brought to unit length, the hardest first,

    - ``(l h_a + (1 - l) h_b) / ||.||`` for each pair of places ``(a, b)`` and its share ``l``;
    - ``sum_k b_k h_k / ||.||`` with ``b = softmax(s(q, h) / t)``, all of them at once.

    A mixture of two is at least as similar to the query as the less similar of them, and more
    so once it is back on the sphere, wherever that similarity is positive.

    Args:
        queries: ``q``, (A, d), of any length.
        candidates: (A, K, d), in any order.
        pairs: (P, 2) places in the order of hardness, from 0, the same for all queries.
        shares: ``l``, (P,), in [0, 1].
        temperature: ``t`` of the list-wise weights, above 0.
        list_wise: also mix all K.

    Returns:
        (A, P + 1, d), or (A, P, d) without the list-wise one. Gradients flow to the candidates;
        order and list-wise weights take none.
    """
    unit = F.normalize(candidates, dim=2)
    scores = torch.einsum("ad,akd->ak", F.normalize(queries, dim=1), unit).detach()
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    ranked = unit.gather(1, order[..., None].expand_as(unit))
    share = shares.to(ranked)[None, :, None]
    mixed = torch.lerp(ranked[:, pairs[:, 1]], ranked[:, pairs[:, 0]], share)
    if list_wise:
        weights = (scores / temperature).softmax(1)
        mixed = torch.cat([mixed, torch.einsum("ak,akd->ad", weights, ranked)[:, None]], 1)
    return F.normalize(mixed, dim=2)


class OnlineHardNegativeMixing(QueryLoss):
    """InfoNCE with negatives that are mixed, in every step, from the hardest ones at hand.

    Zhao, Hu, Shan, Huang, Zhou, Zhang, Sun, Liu, Li, Wei, Pan, Xiang, Zhang, Wang, Yu, Hu, Zhang
    (2025), KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding
    Model, arXiv:2506.20923. Mixing on the sphere is from Kalantidis, Sariyildiz, Pion, Weinzaepfel,
    Larlus (2020), Hard Negative Mixing for Contrastive Learning, arXiv:2010.01028.

    Mined negatives grow easy as the network learns. Each query's hardest ``K`` negatives are mixed
    in pairs, with a share ``l ~ Beta(2, 2)``, and all together (list-wise), brought back to unit
    length, and stand in the denominator of that query alone; see :func:`mix_hard_negatives`.
    Candidates are the query's own hard negatives where there are any (``negatives``), the
    positives of the other queries of all ranks where there are none.

    Pairs and shares are drawn once a step, by places in the order of hardness, and hold for all
    queries: each query's mixtures have the distribution that draws of its own would give them,
    and how queries are spread over ranks makes no difference.

    Formula from the paper as remembered, not checked against code, of which none is published;
    pair-wise and list-wise mixing and Beta(2, 2) are the paper's by the accounts of others. The
    list-wise weights, the number of pairs and the temperature are ours. Negatives go on learning
    through their mixtures.

    Args:
        strength: the multiplier.
        hardest: ``K``, at least 2: how many of the hardest candidates of a query are mixed;
            fewer where there are fewer.
        pairs: how many pair-wise mixtures each query gets, from 0.
        list_wise: whether it also gets the mixture of all ``K``.
        alpha: of Beta(alpha, alpha), above 0.
        gamma: weight of each query, ``(1 - p_i)^gamma``, as in :class:`FocalInfoNCE`; 0 weights
            all alike. The paper has 0.5 with mixed negatives.
        temperature: ``t``, above 0.
        views: where queries and positives (B, d) are; see :class:`TwoViews`. By default the keys
            ``z1`` and ``z2`` of the dict that ``training_step`` returns.
        negatives: where hard negatives (B, M, d) are, a key of the returned dict
            (``"outputs.negatives"``) or a submodule; ``None`` without any.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or nothing is mixed.
        RegularizationError: in the first step, if shapes are not these.

    Note:
        Over ranks: global; candidates of all ranks are gathered with gradients, and each rank
        scores its own queries. Under accumulation negatives come from the micro-batch alone.
        Cost: InfoNCE, a sort of the scores, and ``B (K + pairs) d`` numbers for the mixtures.
        With fewer than two candidates a step has no mixtures.

        As the only loss, let ``training_step`` return a zero of the network:
        ``{"loss": 0.0 * z1.sum(), "z1": z1, "z2": z2}``. The loss contains InfoNCE: do not add
        another one for the same views.

        It hurts where the hardest candidates are unmarked positives: mixtures lie between them,
        and push away what belongs together.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import OnlineHardNegativeMixing
        >>> trainer = L.Trainer(callbacks=[OnlineHardNegativeMixing(pairs=4)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile "
            "Embedding Model",
            "Zhao et al.",
            2025,
            "2506.20923",
        ),
        Paper(
            "Hard Negative Mixing for Contrastive Learning",
            "Kalantidis et al.",
            2020,
            "2010.01028",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mix_hard_negatives)
    explanation: ClassVar[str] = "contrasts queries with mixtures of their hardest negatives"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        hardest: int = 8,
        pairs: int = 4,
        list_wise: bool = True,
        alpha: float = 2.0,
        gamma: float = 0.0,
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
        cure = "OnlineHardNegativeMixing(hardest=8, pairs=4)"
        check_range(self, "alpha", alpha, 0, low_open=True, cure=cure)
        for key, value, least in (("hardest", hardest, 2), ("pairs", pairs, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                problem = f"`{key}` must be a whole number from {least}, got {value!r}"
                raise ArgumentError(self, problem, cure=cure)
        if pairs == 0 and not list_wise:
            raise ArgumentError(self, "nothing is mixed with pairs=0, list_wise=False", cure=cure)
        self.hardest, self.pairs, self.list_wise = hardest, pairs, list_wise
        self.alpha = alpha

    def private_negatives(
        self,
        step: Step,
        queries: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        rows: Tensor,
    ) -> Tensor | None:
        """The mixtures of each of this rank's queries."""
        candidates = self._candidates(queries, positives, negatives, rows)
        if candidates.shape[1] < 2:
            return None
        pairs, shares = self._draw(step, candidates.shape[1])
        return mix_hard_negatives(
            queries[rows],
            candidates,
            pairs.to(rows.device),
            shares,
            self.temperature,
            self.list_wise,
        )

    def _candidates(
        self, queries: Tensor, positives: Tensor, negatives: Tensor | None, rows: Tensor
    ) -> Tensor:
        """The hardest negatives (B, K, d) of this rank's queries."""
        asked = F.normalize(queries[rows].detach(), dim=1)
        if negatives is not None:
            own = negatives[rows]
            scores = torch.einsum("ad,akd->ak", asked, F.normalize(own.detach(), dim=2))
            top = scores.topk(min(self.hardest, own.shape[1]), 1).indices
            return own.gather(1, top[..., None].expand(-1, -1, own.shape[2]))
        scores = asked @ F.normalize(positives.detach(), dim=1).T
        scores = scores.scatter(1, rows[:, None], -torch.inf)
        return positives[scores.topk(min(self.hardest, len(positives) - 1), 1).indices]

    def _draw(self, step: Step, places: int) -> tuple[Tensor, Tensor]:
        """Two different places for each pair, and its share; the same on all ranks."""
        seed = step.rng(self, shared=True).initial_seed()
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(places, (self.pairs,), generator=generator)
        apart = torch.randint(1, places, (self.pairs,), generator=generator)
        shares = draw_beta(self.alpha, self.pairs, generator)
        return torch.stack([first, (first + apart) % places], 1), shares
