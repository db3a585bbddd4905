"""Mixes positives and negatives of an anchor, and asks for half of both, as mixup does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    RegularizationError,
    Regularizer,
    Schedule,
    Signals,
    Step,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.batch_transform import MIXING_EXEMPTIONS, draw_beta
from lightning_reg.mechanisms.feature_penalty import check_layer
from lightning_reg.mechanisms.joint_rows import joint_rows

__all__ = ["Metrix", "metrix"]

PairLoss = Literal["contrastive", "multi_similarity"]
Partner = Literal["positive", "anchor"]
Mixture = Callable[[Tensor, Tensor], Tensor]
_PARTNERS: tuple[Partner, ...] = get_args(Partner)
# The scales and the threshold of the released code of the multi-similarity loss.
_ALPHA, _BETA, _THRESHOLD = 2.0, 40.0, 0.5


def metrix(
    embeddings: Tensor,
    labels: Tensor,
    share: float | Tensor,
    *,
    partner: Partner = "positive",
    loss: PairLoss = "contrastive",
    margin: float = 0.5,
    weight: float = 0.4,
    hardest: int | None = None,
    mixture: Mixture | None = None,
) -> Tensor:
    """``l_clean + w l_mixed`` of a batch of labeled embeddings.

    A pair loss is a sum over an anchor's positives and one over its negatives,
    ``s+(sum_p r+(s(a, p))) + s-(sum_n r-(s(a, n)))``. A mixture ``v = l x + (1 - l) x'`` of a
    positive ``x`` and a negative ``x'`` stands in both sums, with the weight ``l`` in the first
    and ``1 - l`` in the second:

    - contrastive, of distances ``D`` of unit vectors: the mean of ``l D`` plus the mean of
      ``(1 - l) max(0, m - D)``, each over the terms that are not 0;
    - multi-similarity, of cosines ``s``, the mean over anchors of ``log(1 + sum l e^{-2 (s -
      1/2)}) / 2 + log(1 + sum (1 - l) e^{40 (s - 1/2)}) / 40``.

    The clean loss is the same with every positive, and every negative, of weight 1.

    Args:
        embeddings: (N, d), of any length; brought to unit length here, as are mixtures.
        labels: (N,) class indices.
        share: ``l``, in [0, 1].
        partner: what a negative is mixed with: each ``"positive"`` of the anchor, or the
            ``"anchor"`` itself.
        loss: ``"contrastive"`` or ``"multi_similarity"``.
        margin: ``m`` of the contrastive loss.
        weight: ``w``.
        hardest: how many of the most similar negatives of an anchor are mixed; ``None``: all.
        mixture: the embeddings (T, d) of mixtures of the samples at two positions (T,), where
            not the embeddings themselves are mixed.

    Returns:
        A scalar, at least 0; 0 where no anchor has a positive or a negative.
    """
    unit = F.normalize(embeddings, dim=1)
    cosine = unit @ unit.T
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    score = partial(_SCORES[loss], anchors=len(labels), margin=margin)
    a, p = (same & ~itself).nonzero().T
    b, n = (~same).nonzero().T
    clean = score(_Terms(a, cosine[a, p], 1.0), _Terms(b, cosine[b, n], 1.0))
    partners = itself if partner == "anchor" else same & ~itself
    c, x, y = _triplets(cosine.detach(), partners, ~same, hardest)
    mixed = (
        _cosine_of_mixture(cosine, c, x, y, share)
        if mixture is None
        else (unit[c] * F.normalize(mixture(x, y), dim=1)).sum(1)
    )
    return clean + weight * score(_Terms(c, mixed, share), _Terms(c, mixed, 1 - share))


class _Terms(NamedTuple):
    """Cosines (T,) to anchors (T,), all of one weight."""

    anchor: Tensor
    cosine: Tensor
    weight: float | Tensor


def _contrastive(positive: _Terms, negative: _Terms, anchors: int, margin: float) -> Tensor:
    near = positive.weight * _distance(positive.cosine)
    far = negative.weight * (margin - _distance(negative.cosine)).clamp_min(0)
    return _mean_of_nonzero(near) + _mean_of_nonzero(far)


def _multi_similarity(positive: _Terms, negative: _Terms, anchors: int, margin: float) -> Tensor:
    near = _sums((-_ALPHA * (positive.cosine - _THRESHOLD)).exp(), positive, anchors)
    far = _sums((_BETA * (negative.cosine - _THRESHOLD)).exp(), negative, anchors)
    return (near.log1p() / _ALPHA + far.log1p() / _BETA).mean()


_SCORES = {"contrastive": _contrastive, "multi_similarity": _multi_similarity}


def _distance(cosine: Tensor) -> Tensor:
    """``sqrt(2 - 2 s)`` of unit vectors; 0 with no gradient where they are equal."""
    square = 2 - 2 * cosine
    apart = square > torch.finfo(square.dtype).eps
    return square.where(apart, 1.0).sqrt().where(apart, 0.0)


def _mean_of_nonzero(terms: Tensor) -> Tensor:
    return terms.sum() / (terms > 0).sum().clamp_min(1)


def _sums(values: Tensor, terms: _Terms, anchors: int) -> Tensor:
    """The weighted sum (N,) of each anchor's values (T,)."""
    return values.new_zeros(anchors).index_add(0, terms.anchor, terms.weight * values)


def _triplets(
    cosine: Tensor, partners: Tensor, negatives: Tensor, hardest: int | None
) -> tuple[Tensor, ...]:
    """Positions (T,) of anchors, of their partners, and of negatives that these are mixed with."""
    if hardest is not None and hardest < len(cosine):
        scores = cosine.masked_fill(~negatives, -torch.inf)
        chosen = torch.zeros_like(negatives).scatter(1, scores.topk(hardest, 1).indices, True)
        negatives = negatives & chosen
    anchor, partner = partners.nonzero().T
    pair, negative = negatives[anchor].nonzero().T
    return anchor[pair], partner[pair], negative


def _cosine_of_mixture(
    cosine: Tensor, anchor: Tensor, x: Tensor, y: Tensor, share: float | Tensor
) -> Tensor:
    """Of anchors to mixtures of unit vectors, without making them: from those of the parts."""
    rest = 1 - share
    square = share**2 + rest**2 + 2 * share * rest * cosine[x, y]
    length = square.clamp_min(torch.finfo(cosine.dtype).eps).sqrt()
    return (share * cosine[anchor, x] + rest * cosine[anchor, y]) / length


class Metrix(Regularizer):
    """Metric learning with mixtures of positives and negatives beside the pairs themselves.

    Venkataramanan, Psomas, Kijak, Amsaleg, Karantzalos, Avrithis (2021), It Takes Two to Tango:
    Mixup for Deep Metric Learning, arXiv:2106.04990.

    ``l_clean + w l_mixed``: a pair loss, and the same loss of mixtures ``v = l x + (1 - l) x'`` of
    a positive and a negative of each anchor, which count as positive with ``l`` and as negative
    with ``1 - l``; see :func:`metrix`. ``l ~ Beta(alpha, alpha)`` is drawn once a step. What is
    mixed are embeddings, or, with ``head``, the features of an earlier layer, which that part of
    the network then embeds.

    Confirmed against billpsomas/Metrix_ICLR22@7ce730c (``train.py``, ``mixup/``), whose clean and
    mixed contrastive losses of embeddings ours equal where an anchor has one positive, and whose
    defaults are ours: ``w = 0.4``, ``alpha = 2``, margin 1/2. With more positives it mixes the
    first one of the batch only; here all of them, as in the paper, so that the order of a batch
    does not matter. It mixes anchors with negatives only where they have no positive at all, in
    half of the steps; here, as in the paper (from memory), a coin decides for all anchors. The
    multi-similarity form is from memory of the paper, with the scales of the released code of
    that loss.

    Args:
        strength: the multiplier of the whole.
        layer: the submodule whose output is mixed: embeddings (B, d) or, with ``head``, features.
        head: the submodule that makes embeddings of the features; ``None`` if ``layer`` gives
            them. It is called once more, on the mixtures.
        loss: ``"contrastive"`` or ``"multi_similarity"``.
        margin: of the contrastive loss, above 0.
        weight: ``w``, at least 0.
        alpha: of Beta(alpha, alpha), above 0.
        partner: what negatives are mixed with: ``"positive"``, ``"anchor"``, or ``"either"``, one
            of them for each step.
        hardest: how many of the most similar negatives of an anchor are mixed; ``None``: all,
            which with ``head`` is one row for each anchor, positive and negative.
        signals: where labels are, if not in the usual places.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or a layer is not there.
        RegularizationError: in the first step, if embeddings are not (B, d), or labels not class
            indices (B,).

    Note:
        Over ranks: global; embeddings (and features) of all ranks are gathered with gradients,
        and draws are the same on all ranks. Under accumulation pairs come from the micro-batch.
        Cost: products (N, d) by (d, N), and one number for each anchor, positive and negative;
        mixtures of embeddings are never made. With ``head`` its pass over all mixtures, on every
        rank; a BatchNorm in it takes its statistics from them too.

        As the only loss, let ``training_step`` return a zero of the network. Batches have to hold
        several samples of each class.

        It hurts with classes of several clusters: between two of them lie other classes, where a
        mixture counts as half a positive.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import Metrix
        >>> trainer = L.Trainer(callbacks=[Metrix(layer="embedding")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "It Takes Two to Tango: Mixup for Deep Metric Learning",
            "Venkataramanan et al.",
            2021,
            "2106.04990",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("features", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"features", "targets"})
    exemptions: ClassVar[Mapping[str, str]] = MIXING_EXEMPTIONS
    function: ClassVar[Callable[..., Any] | None] = staticmethod(metrix)
    explanation: ClassVar[str] = "adds a pair loss of embeddings and of mixtures of them"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        layer: str,
        head: str | None = None,
        loss: PairLoss = "contrastive",
        margin: float = 0.5,
        weight: float = 0.4,
        alpha: float = 2.0,
        partner: Literal["positive", "anchor", "either"] = "either",
        hardest: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        cure = 'Metrix(layer="embedding", loss="contrastive", partner="either")'
        check_range(self, "margin", margin, 0, low_open=True, cure=cure)
        check_range(self, "weight", weight, 0, cure=cure)
        check_range(self, "alpha", alpha, 0, low_open=True, cure=cure)
        self._check_one_of("loss", loss, tuple(_SCORES), cure)
        self._check_one_of("partner", partner, (*_PARTNERS, "either"), cure)
        whole = isinstance(hardest, int) and not isinstance(hardest, bool)
        if hardest is not None and not (whole and hardest >= 1):
            problem = f"`hardest` must be a whole number from 1 or None, got {hardest!r}"
            raise ArgumentError(self, problem, cure=cure)
        self.layer, self.head = layer, head
        self.loss, self.margin, self.weight = loss, margin, weight
        self.alpha, self.partner, self.hardest = alpha, partner, hardest

    @property
    def layers(self) -> tuple[str, ...]:
        """The submodules to capture."""
        return (self.layer,) if self.head is None else (self.layer, self.head)

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a layer that is not there."""
        for layer in self.layers:
            check_layer(self, layer, pl_module)

    def penalty(self, step: Step) -> Tensor:
        """Phase 4."""
        embeddings = step.feature(self.head or self.layer)
        labels = step.targets
        self._check_rows(embeddings, labels)
        features = [] if self.head is None else [step.feature(self.layer)]
        _, (embeddings, *features) = joint_rows(step.comm, embeddings, *features)
        partner, share = self._draw(step)
        return metrix(
            embeddings,
            step.comm.gather(labels),
            share,
            partner=partner,
            loss=self.loss,
            margin=self.margin,
            weight=self.weight,
            hardest=self.hardest,
            mixture=self._mixture(step, features[0], share) if features else None,
        )

    def _draw(self, step: Step) -> tuple[Partner, float]:
        """What is mixed in this step, and its share; the same on all ranks."""
        seed = step.rng(self, shared=True).initial_seed()
        generator = torch.Generator().manual_seed(seed)
        share = float(draw_beta(self.alpha, 1, generator))
        if self.partner != "either":
            return self.partner, share
        return _PARTNERS[int(torch.randint(2, (), generator=generator))], share

    def _mixture(self, step: Step, features: Tensor, share: float) -> Mixture:
        """Embeds mixtures of features."""
        head = step.module.get_submodule(self.head or "")
        kind = next((p.dtype for p in head.parameters()), features.dtype)

        def embed(x: Tensor, y: Tensor) -> Tensor:
            if len(x) == 0:
                return features.new_zeros(0, 1)
            mixed = share * features[x] + (1 - share) * features[y]
            return full_precision(head(mixed.to(kind)))

        return embed

    def _check_rows(self, embeddings: Tensor, labels: Any) -> None:
        if embeddings.ndim != 2:
            raise RegularizationError(
                self,
                f"needs embeddings (B, d), got {tuple(embeddings.shape)}",
                cure='Metrix(layer="<a layer that returns a vector per sample>")',
            )
        whole = isinstance(labels, Tensor) and not labels.is_floating_point()
        if not whole or labels.shape != embeddings.shape[:1]:
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise RegularizationError(
                self,
                f"needs one class index for each of {len(embeddings)} embeddings, got {shape}",
                cure='signals=Signals(targets="batch.<key>")',
            )

    def _check_one_of(self, name: str, value: str, known: tuple[str, ...], cure: str) -> None:
        if value not in known:
            problem = f"`{name}` must be one of {', '.join(known)}, got {value!r}"
            raise ArgumentError(self, problem, cure=cure)
