"""Techniques that replace the labels of a classification loss by other distributions.

A technique supplies :meth:`TargetTransform.new_targets`: target distributions from target
distributions. The mechanism takes care of

- finding logits and labels, also per token or pixel, and of leaving out ignored positions;
- class indices and soft labels alike, mixed by a batch transform or not: the technique sees the
  distribution that results;
- the labels in the batch, which stay what they are, so that metrics of the user's step go on
  counting them;
- the loss: the cross-entropy of the captured logits with the new targets, in place of the user's
  own, after a check in the first step that this is what the user's loss was.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.signals import Signals
from lightning_reg.engine.step import Step
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.loss_replacement import Replaces, check_replaces


class TargetTransform(Regularizer):
    """Base of techniques that change the targets of the loss.

    Args:
        strength: how far targets are moved; 0 turns the technique off.
        replaces: what becomes of the user's loss. ``"cross_entropy"``: it is the cross-entropy,
            which is checked in the first step, and is replaced; ``"term"``: it contains the
            cross-entropy, which is replaced, and the other terms stay; ``"loss"``: it is dropped
            for the cross-entropy.
        signals: where targets and logits are, if not in the usual places.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"targets"})
    writes: ClassVar[frozenset[str]] = frozenset({"targets"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        check_replaces(self, replaces)
        self.replaces = replaces

    @abstractmethod
    def new_targets(self, distribution: Tensor, strength: float, step: Step) -> Tensor:
        """Other targets.

        Args:
            distribution: (N, C), rows that sum to 1, in float32 or float64.
            strength: the technique's strength now.
            step: the step, for what else a technique may need.

        Returns:
            (N, C).
        """

    def transform_targets(self, step: Step, distribution: Tensor) -> Tensor:
        """Phase 3."""
        return self.new_targets(distribution, step.strength(self), step)


__all__ = ["Replaces", "TargetTransform"]
