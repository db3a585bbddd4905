"""Penalties on predictions together with their labels, over the joint batch of all ranks.

A technique supplies :meth:`LabeledOutputPenalty.value`: a number from rows of logits and the
distribution that each row's label is. The mechanism takes care of

- finding logits and labels, in float32 at least, and of their layout: (B, C), (B, T, C),
  (B, C, H, W);
- leaving out positions that the labels mark as ignored;
- labels as distributions: class indices, soft labels, and those of a batch that was mixed;
- what the techniques of this kind read of a row: the confidence in the most likely class, and
  whether that is right.

A value is a :class:`JointMean`, or a number that was computed from sums or rows of all ranks
(``step.comm.reduce``, ``step.comm.gather``), so that a statistic of a batch is one of the joint
batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.criterion import as_distribution, mixed
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.output_penalty import LogitRows


def confidence_and_correctness(logits: Tensor, distribution: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability of each row, and the label's mass on that class.

    Args:
        logits: (N, C).
        distribution: (N, C) labels; one-hot ones give a correctness of 0 or 1.

    Returns:
        (N,) with gradients, and (N,) without.
    """
    confidence, top = logits.softmax(-1).max(-1)
    correctness = distribution.gather(-1, top.unsqueeze(-1)).squeeze(-1)
    return confidence, correctness.detach()


class LabeledOutputPenalty(LogitRows):
    """Base of penalties on logits (N, C) and labels.

    Args:
        strength: the multiplier, at least 0.
        ignore_index: positions with this label are left out; ``None`` keeps all.
        class_dim: where the classes lie in logits of more than two dimensions. By default it
            follows from the shape of the labels.
        signals: where logits and labels are, if not in the usual places.
        name: the name in logs and checkpoints.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"logits", "targets"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        if not isinstance(strength, Schedule):
            cure = f"{type(self).__name__}(strength=1.0)"
            check_range(self, "strength", strength, 0, cure=cure)

    @abstractmethod
    def value(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor | JointMean:
        """The penalty.

        Args:
            step: the micro-batch.
            logits: (N, C) of this rank, with a graph; N may be 0.
            distribution: (N, C) the labels.
        """

    def penalty(self, step: Step) -> Tensor | JointMean:
        """Phase 4."""
        logits, targets = step.logits, step.targets
        if not isinstance(targets, Tensor):
            raise self._unfit(logits, type(targets).__name__)
        if targets.is_floating_point() and targets.shape == logits.shape:
            rows, distribution = self._soft_rows(logits, targets)
        else:
            rows, distribution = self._hard_rows(logits, targets)
        return self.value(step, rows, mixed_labels(self, step, distribution))

    def _soft_rows(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        class_dim = self.class_dim if self.class_dim is not None else 1
        rows, labels = (t.movedim(class_dim, -1).flatten(0, -2) for t in (logits, targets))
        return rows, labels.to(rows)

    def _hard_rows(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows(logits, targets)
        labels = targets.reshape(-1)
        if targets.is_floating_point() or targets.numel() * rows.shape[-1] != logits.numel():
            raise self._unfit(logits, str(tuple(targets.shape)))
        if self.ignore_index is not None:
            labels = labels[labels != self.ignore_index]
        return rows, as_distribution(labels, rows)

    def _unfit(self, logits: Tensor, targets: Any) -> RegularizationError:
        return RegularizationError(
            self,
            f"logits {tuple(logits.shape)} and targets {targets} are not those of one "
            "classification",
            cure='signals=Signals(logits="module.<name>", targets="batch.<key>")',
        )


def mixed_labels(owner: object, step: Step, distribution: Tensor) -> Tensor:
    """Labels (B, C) of samples that a technique has mixed; one label per sample is needed."""
    for _, lam in step.mixes:
        if len(lam) != len(distribution):
            raise RegularizationError(
                owner,
                f"was given {len(distribution)} labels for {len(lam)} mixed samples: a label "
                "per sample is needed, none ignored",
                cure=f"remove {type(step.mixers[0]).__name__}",
            )
    return mixed(step, distribution)


def joint_mean(step: Step, values: Tensor) -> Tensor:
    """The mean over the rows (N, K) of all ranks, (K,), with gradients; 0 without rows."""
    count = values.new_full((1,), len(values))
    sums = step.comm.reduce(torch.cat([values.sum(0), count]))
    mean: Tensor = sums[:-1] / sums[-1].detach().clamp_min(1)
    return mean


__all__ = [
    "LabeledOutputPenalty",
    "confidence_and_correctness",
    "joint_mean",
    "mixed_labels",
]
