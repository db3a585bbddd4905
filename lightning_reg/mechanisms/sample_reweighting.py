"""Weights on the samples of the loss, from what their losses are now.

A technique supplies :meth:`SampleReweighting.weights`: one number per sample, from the losses of
the joint batch of all ranks. The mechanism takes care of

- the losses: of each sample, detached, gathered over ranks before anything that is not linear,
  so that ranks with other samples agree on what is large; a sample of many terms (the tokens of
  a sequence, the pixels of an image) counts with their mean, and all of them get its weight;
- groups, for techniques that weight by them (:class:`GroupReweighting`): they travel with the
  losses;
- the scale: weights have mean one over the joint batch, so that the learning rate keeps its
  meaning, unless a technique's ``normalized`` says that their sum is part of its method; each
  rank takes its own of them, also where ranks have unequally many samples;
- the strength: the share of the weighted loss, the rest stays the plain mean;
- a loss that is not finite on any rank: weights of one for that batch on all;
- the log: the effective sample size, ``(sum w)^2 / sum w^2``, as a share of the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import RegularizationError, Regularizer, Schedule, Signals, Step
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
    normalized: ClassVar[bool] = True

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
        columns = [own, rank, *self._companions(step, len(own))]
        joint = step.comm.gather(torch.stack([c.to(own) for c in columns], dim=1))
        weights = self._weights(step, joint)
        if not step.is_rerun:
            # Where no sample counts, none is effective: 0 / tiny.
            squares = weights.square().sum().clamp_min(torch.finfo(weights.dtype).tiny)
            effective = weights.sum().square() / (len(weights) * squares)
            step.log(self, effective, joint=True)
        share = step.strength(self)
        weights = 1 + share * (weights[joint[:, 1] == step.comm.rank] - 1)
        return weights if sample is None else weights[sample]

    def _companions(self, step: Step, samples: int) -> list[Tensor]:
        """Further numbers (samples,) of this rank's samples that go to all ranks."""
        return []

    def _found(self, step: Step, joint: Tensor) -> Tensor:
        return self.weights(step, joint[:, 0])

    def _weights(self, step: Step, joint: Tensor) -> Tensor:
        """Weights of the joint batch; of one each if a loss is not finite."""
        weights = self._found(step, joint)
        weights = weights / weights.mean() if self.normalized else weights
        # 0 / 0, or a loss that is not finite: no sample is better than another.
        good = torch.isfinite(weights).all() & torch.isfinite(joint[:, 0]).all()
        return torch.where(good, weights, torch.ones_like(weights))


class GroupReweighting(SampleReweighting):
    """Base of techniques that weight samples by the losses of their groups.

    Args:
        strength: the share of the weighted loss, in [0, 1]; the rest is the plain mean.
        num_groups: the groups are 0 to ``num_groups - 1``.
        replaces: what the weighted cross-entropy replaces of the user's loss.
        signals: where ``domain`` (the group of each sample), logits and labels are.
        name: the name in logs and checkpoints.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "targets", "domain")
    normalized: ClassVar[bool] = False

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        num_groups: int,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        cure = f"{type(self).__name__}(num_groups=4)"
        check_range(self, "num_groups", num_groups, 1, cure=cure)
        self.num_groups = num_groups

    @abstractmethod
    def group_weights(self, step: Step, losses: Tensor, counts: Tensor) -> Tensor:
        """The factor (G,) of each group's mean loss; their weighted sum is the loss.

        Args:
            step: the micro-batch.
            losses: (G,) the mean loss of each group over all ranks; 0 for one without samples.
            counts: (G,) the number of its samples on all ranks.
        """

    def weights(self, step: Step, losses: Tensor) -> Tensor:
        """Not asked: the groups are needed as well."""
        raise NotImplementedError

    def _companions(self, step: Step, samples: int) -> list[Tensor]:
        domain = torch.as_tensor(step.domain).reshape(-1)
        if len(domain) != samples:
            raise RegularizationError(
                self,
                f"needs the group of each of {samples} samples, got {len(domain)}",
                cure='signals=Signals(domain="batch.group")',
            )
        return [domain]

    def _found(self, step: Step, joint: Tensor) -> Tensor:
        losses, groups = joint[:, 0], joint[:, 2].long()
        self._check_groups(step, groups)
        none = losses.new_zeros(self.num_groups)
        counts = none.index_add(0, groups, torch.ones_like(losses))
        sums = none.index_add(0, groups, losses)
        factors = self.group_weights(step, sums / counts.clamp_min(1), counts)
        return (factors / counts.clamp_min(1))[groups] * len(losses)

    def _check_groups(self, step: Step, groups: Tensor) -> None:
        # Reading them waits for an accelerator: there the first step is looked at only.
        if groups.device.type != "cpu" and step.global_step:
            return
        low, high = (int(v) for v in torch.aminmax(groups))
        if low < 0 or high >= self.num_groups:
            raise RegularizationError(
                self,
                f"knows groups 0 to {self.num_groups - 1}, got {low if low < 0 else high}",
                cure=f"{type(self).__name__}(num_groups=<the number of groups>)",
            )


def sample_of_rows(targets: Tensor, classes: int, rows: int, device: torch.device) -> Tensor:
    """The position (rows,) in the batch of the sample to which each row of the loss belongs.

    Args:
        targets: (B, ...) class indices, of which those that are no class have no row, or floats.
        classes: the number of classes.
        rows: how many rows the loss has.
        device: of the result.
    """
    positions = torch.arange(len(targets), device=device)
    if targets.is_floating_point():
        return positions.repeat_interleave(rows // max(1, len(targets)))
    # As the criterion: a label that is no class is one that the user's loss ignores.
    kept = ((targets >= 0) & (targets < classes)).reshape(len(targets), -1)
    return positions.repeat_interleave(kept.sum(1), output_size=rows)


def _sample_of(targets: Tensor, classes: int, rows: int, device: torch.device) -> Tensor | None:
    """The sample (among those with any row) of each row of the loss; ``None`` if it is the row."""
    if rows == len(targets):
        return None
    positions = sample_of_rows(targets, classes, rows, device)
    sample: Tensor = torch.unique_consecutive(positions, return_inverse=True)[1]
    return sample


def _means(losses: Tensor, sample: Tensor | None) -> Tensor:
    """The mean loss of each sample."""
    if sample is None or len(sample) == 0:
        return losses
    counts = torch.bincount(sample)
    return losses.new_zeros(len(counts)).index_add_(0, sample, losses) / counts


__all__ = ["GroupReweighting", "SampleReweighting", "sample_of_rows"]
