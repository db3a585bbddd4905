"""Losses that take the place of the cross-entropy, sample by sample.

A technique supplies :meth:`LossReplacement.losses`: one number per row of logits. The mechanism
takes care of

- finding logits and labels, in float32 at least and outside autocast, with ignored positions
  left out and labels as distributions (smoothed and mixed labels come as they are);
- the user's own loss, which is checked to be the cross-entropy that is replaced, dropped, or
  kept for its other terms (``replaces``); the loss that the user logs stays what it was;
- the share of the new loss (``strength``), the mean over samples, accumulation and ranks;
- the log: the mean of the new loss over the micro-batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from lightning_reg.engine import ArgumentError, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.criterion import soft_cross_entropy
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics

Replaces = Literal["cross_entropy", "term", "loss"]
_REPLACES = ("cross_entropy", "term", "loss")


def check_replaces(owner: object, replaces: str) -> None:
    """Raise :class:`ArgumentError` unless ``replaces`` is one of the three ways."""
    if replaces not in _REPLACES:
        raise ArgumentError(
            owner,
            f"`replaces` must be one of {', '.join(_REPLACES)}, got {replaces!r}",
            cure=f'{type(owner).__name__}(replaces="cross_entropy")',
        )


class LossReplacement(Regularizer):
    """Base of losses that are a mean over samples and stand in for the cross-entropy.

    Args:
        strength: the share of the new loss, in [0, 1]; the rest stays the cross-entropy. 1
            replaces it whole, 0 leaves the user's loss alone.
        replaces: what of the user's loss goes. ``"cross_entropy"``: all of it, after a check on
            the first step that it is the cross-entropy; ``"term"``: the cross-entropy that is one
            term of it, the others stay; ``"loss"``: all of it, whatever it is.
        signals: where logits and labels are, if not in the usual places.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"logits", "targets"})
    writes: ClassVar[frozenset[str]] = frozenset({"losses"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"criterion"})

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
    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss (N,) of each row.

        Args:
            step: the micro-batch.
            logits: (N, C), float32 at least, with a graph.
            distribution: (N, C) the labels: one-hot rows, or soft ones.
        """

    def per_sample_loss(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """Phase 3."""
        own = self.losses(step, logits, distribution)
        if not step.is_rerun:
            step.log(self, own.detach().mean())
        share = step.strength(self)
        if share == 1:
            return own
        return (1 - share) * soft_cross_entropy(logits, distribution) + share * own


__all__ = ["LossReplacement", "Replaces", "check_replaces"]
