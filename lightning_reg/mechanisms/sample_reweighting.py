"""Weights on the samples of the loss, from what their losses are now.

A technique supplies :meth:`SampleReweighting.weights`: one number per sample, from the losses of
the joint batch of all ranks. The mechanism takes care of

- the losses: of each sample, detached, gathered over ranks before anything that is not linear,
  so that ranks with other samples agree on what is large; a sample of many terms (the tokens of
  a sequence, the pixels of an image) counts with their mean, and all of them get its weight;
- the scale: weights have mean one over the joint batch, so that the learning rate keeps its
  meaning; each rank takes its own of them, also where ranks have unequally many samples;
- the strength: the share of the weighted loss, the rest stays the plain mean;
- a loss that is not finite on any rank: weights of one for that batch on all;
- the log: the effective sample size, ``(sum w)^2 / sum w^2``, as a share of the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Regularizer, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.loss_replacement import Replaces, check_replaces


class SampleReweighting(Regularizer):
    """Base of techniques that weight the samples of the loss.

    Args:
        strength: the share of the weighted loss, in [0, 1]; the rest is the plain mean.
        replaces: what the weighted cross-entropy replaces of the user's loss:
            ``"cross_entropy"`` (checked to be it), ``"term"`` or ``"loss"``.
        signals: where logits and labels are, if not in the usual places.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"losses"})
    writes: ClassVar[frozenset[str]] = frozenset({"losses"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"reweighting"})

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        if not isinstance(strength, Schedule):
            cure = f"{type(self).__name__}(strength=1.0)"
            check_range(self, "strength", strength, 0, 1, cure=cure)
        check_replaces(self, replaces)
        self.replaces = replaces

    @abstractmethod
    def weights(self, step: Step, losses: Tensor) -> Tensor:
        """Weights (N,), at least 0 and of any sum, from the losses (N,) of all ranks' samples."""

    def sample_weights(self, step: Step, losses: Tensor) -> Tensor:
        """Phase 3."""
        assert step.target_distribution is not None
        classes = step.target_distribution.shape[-1]
        sample = _sample_of(step.targets, classes, len(losses), losses.device)
        own = _means(losses, sample)
        rank = torch.full_like(own, step.comm.rank)
        joint = step.comm.gather(torch.stack([own, rank], dim=1))
        weights = _of_mean_one(self.weights(step, joint[:, 0]))
        if not step.is_rerun:
            effective = weights.sum().square() / (len(weights) * weights.square().sum())
            step.log(self, effective, joint=True)
        share = step.strength(self)
        weights = 1 + share * (weights[joint[:, 1] == step.comm.rank] - 1)
        return weights if sample is None else weights[sample]


def _sample_of(targets: Tensor, classes: int, rows: int, device: torch.device) -> Tensor | None:
    """The sample (among those with any row) of each row of the loss; ``None`` if it is the row."""
    if rows == len(targets):
        return None
    if targets.is_floating_point():
        return torch.arange(len(targets), device=device).repeat_interleave(rows // len(targets))
    # As the criterion: a label that is no class is one that the user's loss ignores.
    kept = ((targets >= 0) & (targets < classes)).reshape(len(targets), -1)
    counts = kept.sum(1)
    present = counts > 0
    return torch.arange(int(present.sum()), device=device).repeat_interleave(counts[present])


def _means(losses: Tensor, sample: Tensor | None) -> Tensor:
    """The mean loss of each sample."""
    if sample is None or len(sample) == 0:
        return losses
    counts = torch.bincount(sample)
    return losses.new_zeros(len(counts)).index_add_(0, sample, losses) / counts


def _of_mean_one(weights: Tensor) -> Tensor:
    weights = weights / weights.mean()
    # 0 / 0, or a loss that is not finite: no sample is better than another.
    return torch.where(torch.isfinite(weights).all(), weights, torch.ones_like(weights))


__all__ = ["SampleReweighting"]
