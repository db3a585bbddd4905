"""InfoNCE: a query has to find its positive among negatives, those of all ranks.

A technique supplies :meth:`QueryLoss.private_negatives`, if it has any: what each query of this
rank is contrasted with beside the samples of the batch. The mechanism takes care of

- finding queries, positives and, where there are any, the hard negatives of each query;
- gathering positives and negatives of all ranks *with gradients*, by one gather, while each rank
  works on its own queries only;
- InfoNCE of each query, and its weight where hard queries are to count more (``gamma``);
- the mean over the queries of all ranks, each counting once.

:func:`info_nce` and :func:`nt_xent` are the losses themselves, query by query.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import RegularizationError, Schedule, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.embedding_loss import DEFAULT_VIEWS, TwoViews


def info_nce(
    queries: Tensor,
    positives: Tensor,
    temperature: float,
    *,
    negatives: Tensor | None = None,
    private: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """``-log e^{s(q_i, p_i) / t} / Z_i`` of each query, with the cosine ``s``.

    ``Z_i = sum_j e^{s(q_i, p_j) / t} + sum_{j, k} e^{s(q_i, n_jk) / t}``: the positives of the
    other queries and the negatives of all queries are negatives.

    Args:
        queries: ``q``, (N, d), of any length.
        positives: ``p``, (N, d).
        temperature: ``t``, above 0.
        negatives: ``n``, (N, M, d), hard negatives that every query sees.
        private: (A, K, d), further negatives, each seen by its own query alone.
        rows: (A,) the queries whose loss is asked for; all of them by default.

    Returns:
        (A,), in nats, at least 0.
    """
    if rows is None:
        rows = torch.arange(len(queries), device=queries.device)
    asked = F.normalize(queries, dim=1)[rows]
    columns = [asked @ F.normalize(positives, dim=1).T]
    if negatives is not None:
        columns.append(asked @ F.normalize(negatives.flatten(0, 1), dim=1).T)
    if private is not None:
        columns.append((asked[:, None] * F.normalize(private, dim=2)).sum(2))
    return F.cross_entropy(torch.cat(columns, 1) / temperature, rows, reduction="none")


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, rows: Tensor | None = None) -> Tensor:
    """InfoNCE of each pair in both directions, with both views of all others as negatives.

    For the view k of sample i: ``-log e^{s_i / t} / (e^{s_i / t} + sum_{l, j != i} e^{s(z_i^k,
    z_j^l) / t})`` with ``s_i = s(z_i^1, z_i^2)``; the mean over k.

    Args:
        z1: (N, d), of any length.
        z2: (N, d), the other view of each sample.
        temperature: ``t``, above 0.
        rows: (A,) the pairs whose loss is asked for; all of them by default.

    Returns:
        (A,), in nats, at least 0.
    """
    if rows is None:
        rows = torch.arange(len(z1), device=z1.device)
    both = torch.cat([F.normalize(z1, dim=1), F.normalize(z2, dim=1)])
    first, second = rows, rows + len(z1)
    anchors, partners = torch.cat([first, second]), torch.cat([second, first])
    scores = both[anchors] @ both.T / temperature
    itself = torch.arange(len(both), device=both.device) == anchors[:, None]
    losses = F.cross_entropy(scores.masked_fill(itself, -torch.inf), partners, reduction="none")
    return losses.view(2, -1).mean(0)


def focused(losses: Tensor, gamma: float) -> Tensor:
    """``(1 - p_i)^gamma L_i`` with the probability ``p_i = e^{-L_i}``, which takes no gradient."""
    return (-torch.expm1(-losses.detach())).clamp_min(0).pow(gamma) * losses


class QueryLoss(TwoViews):
    """InfoNCE of queries that look for their positives.

    Args:
        strength: the multiplier.
        temperature: ``t``, above 0.
        gamma: of the weights, at least 0; see :func:`focused`. 0 weights all alike.
        views: where queries and positives (B, d) are; see :class:`TwoViews`.
        negatives: where hard negatives (B, M, d) of the queries are, a key of the returned dict
            (``"outputs.negatives"``) or a submodule; ``None`` without any.
        name: the name in logs and checkpoints.
    """

    exemptions = {"accumulation": "negatives come from the micro-batch alone"}

    def __init__(
        self,
        strength: float | Schedule,
        *,
        temperature: float,
        gamma: float,
        views: str | Sequence[str] = DEFAULT_VIEWS,
        negatives: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, views=views, name=name)
        kind = type(self).__name__
        cure = f"{kind}(gamma=0.5, temperature=0.05)"
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        check_range(self, "gamma", gamma, 0, cure=cure)
        if negatives is not None and (not isinstance(negatives, str) or not negatives):
            raise ArgumentError(
                self,
                f"`negatives` must be a place or None, got {negatives!r}",
                cure=f'{kind}(negatives="outputs.negatives")',
            )
        self.temperature, self.gamma = temperature, gamma
        self.negatives = negatives

    @property
    def layers(self) -> tuple[str, ...]:
        """The submodules to capture."""
        place = self.negatives
        own = () if place is None or place.startswith("outputs.") else (place,)
        return (*super().layers, *own)

    def private_negatives(
        self,
        step: Step,
        queries: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        rows: Tensor,
    ) -> Tensor | None:
        """Negatives (B, K, d) of this rank's queries, each seen by its own query alone.

        Args:
            step: the micro-batch.
            queries: (N, d), of all ranks.
            positives: (N, d), of all ranks.
            negatives: (N, M, d), of all ranks, or ``None``.
            rows: (B,) this rank's positions among the N.
        """
        return None

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        given = [] if self.negatives is None else [self._hard_negatives(step, self.negatives)]
        rows, (queries, positives, *rest) = self.joint_views(step, *given)
        hard = rest[0] if rest else None
        losses = info_nce(
            queries,
            positives,
            self.temperature,
            negatives=hard,
            private=self.private_negatives(step, queries, positives, hard, rows),
            rows=rows,
        )
        return JointMean.of(focused(losses, self.gamma))

    def _hard_negatives(self, step: Step, place: str) -> Tensor:
        found = step.feature(place)
        if found.ndim != 3 or found.shape[1] < 1:
            raise RegularizationError(
                self,
                f"needs `negatives` (B, M, d), M for each query, got {tuple(found.shape)}",
                cure="negatives = negatives.view(len(queries), -1, d)",
            )
        return found


__all__ = ["QueryLoss", "focused", "info_nce", "nt_xent"]
