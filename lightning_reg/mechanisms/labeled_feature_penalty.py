"""Penalties on features together with their labels.

A technique supplies :meth:`LabeledFeaturePenalty.value`: a number from rows of features and the
distribution that each row's label is. The mechanism takes care of

- capturing the output of ``layer``, in float32 at least, and making rows of it (``pooling``);
- one label a row: class indices, soft labels, and those of a batch that was mixed; rows whose
  label is no class (an ignored one) are left out.

A value is a :class:`JointMean`, or a number that was computed from sums or rows of all ranks
(``step.comm.reduce``, ``step.comm.gather``), so that a class mean is one of the joint batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.criterion import as_distribution, labelled, mixed
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.feature_penalty import FeatureRows, Pooling


class LabeledFeaturePenalty(FeatureRows):
    """Base of penalties on rows of features (N, d) and their labels.

    Args:
        strength: the multiplier, at least 0.
        num_classes: labels are 0 to ``num_classes - 1``.
        layer: the submodule whose output is meant.
        pooling: how outputs with positions become rows.
        feature_dim: where the features lie in outputs of more than two dimensions.
        signals: where ``targets`` are, if not in the usual places.
        name: the name in logs and checkpoints.
    """

    needs: ClassVar[tuple[str, ...]] = ("features", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"features", "targets"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        num_classes: int,
        layer: str | None = None,
        pooling: Pooling = "mean",
        feature_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            layer=layer,
            pooling=pooling,
            feature_dim=feature_dim,
            signals=signals,
            name=name,
        )
        cure = f'{type(self).__name__}(num_classes=10, layer="encoder")'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "num_classes", num_classes, 2, cure=cure)
        self.num_classes = num_classes

    @abstractmethod
    def value(self, step: Step, features: Tensor, distribution: Tensor) -> Tensor | JointMean:
        """The penalty.

        Args:
            step: the micro-batch.
            features: (N, d) of this rank, with a graph; N may be 0.
            distribution: (N, C) the labels.
        """

    def penalty(self, step: Step) -> Tensor | JointMean:
        """Phase 4."""
        features, targets = self.feature_rows(step), step.targets
        soft = isinstance(targets, Tensor) and targets.is_floating_point()
        size = len(targets) if soft else torch.as_tensor(targets).numel()
        width = targets.shape[-1] if soft else self.num_classes
        if size != len(features) or width != self.num_classes:
            raise self._unfit(features, targets)
        labels = targets if soft else torch.as_tensor(targets).reshape(-1)
        kept = labelled(features, labels, self.num_classes)
        counted = labelled(labels, labels, self.num_classes)
        if step.mixes and len(counted) < len(labels):
            raise RegularizationError(
                self,
                f"was given {len(counted)} labels for {len(labels)} mixed samples: a label per "
                "sample is needed, none ignored",
                cure=f"remove {type(step.mixers[0]).__name__}",
            )
        distribution = as_distribution(counted, kept.new_empty(0, self.num_classes))
        return self.value(step, kept, mixed(step, distribution))

    def _unfit(self, features: Tensor, targets: Any) -> RegularizationError:
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        return RegularizationError(
            self,
            f"needs one label of {self.num_classes} classes for each row of features, got "
            f"{tuple(features.shape)} and targets {shape}",
            cure='signals=Signals(targets="batch.<key>")',
        )


__all__ = ["LabeledFeaturePenalty"]
