"""Techniques that compare two passes over one batch, each with dropout masks of its own.

A technique supplies :meth:`TwoPasses.values`: one number per row of both passes' logits. The
mechanism takes care of

- the second pass through the user's step: other numbers from torch's global generators (dropout),
  the same from everything else; the user's logs, metrics and BatchNorm's running statistics are
  those of the first;
- the loss, which is the mean of both passes', with all that other techniques make of it;
- logits (B, C), (B, T, C) or (B, C, H, W) of both passes as rows, without ignored positions;
- the mean of the values over all ranks, each row counting once, and the log.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from lightning_reg.engine import Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.output_penalty import LogitRows


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """``(KL(p || q) + KL(q || p)) / 2`` of each row, in nats; gradients flow through both.

    Args:
        first: (..., C) logits of ``p``.
        second: (..., C) logits of ``q``.
    """
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    # 0 log 0 = 0, for a class that is masked with -inf.
    masked = log_p.isneginf() | log_q.isneginf()
    gap = log_p.masked_fill(masked, 0.0) - log_q.masked_fill(masked, 0.0)
    return 0.5 * ((log_p.exp() - log_q.exp()) * gap).sum(-1)


class TwoPasses(LogitRows):
    """Base of techniques that add ``strength * mean_n d(first_n, second_n)``.

    Args:
        strength: the multiplier, at least 0; at 0 there is no second pass.
        ignore_index: positions with this integer label are left out; ``None`` keeps all.
        class_dim: where the classes lie in logits of more than two dimensions. By default it
            follows from the shape of the labels.
        signals: where logits and labels are, if not in the usual places.
        name: the name in logs, checkpoints and random streams.
    """

    writes: ClassVar[frozenset[str]] = frozenset({"losses"})
    # A pass of theirs would lack the term of both passes.
    exclusive: ClassVar[frozenset[str]] = frozenset({"weight_perturbation", "adversarial_inputs"})

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
            check_range(self, "strength", strength, 0, cure=f"{type(self).__name__}(1.0)")

    @abstractmethod
    def values(self, step: Step, first: Tensor, second: Tensor) -> Tensor:
        """The term (N,) of each row, from logits (N, C) of both passes, with graphs; N may be 0."""

    def perturb(self, step: Step, total: Tensor) -> Tensor:
        """Phase 5: the second pass."""
        first, seen = self._logits(step), []
        other = step.rerun(
            look=lambda: seen.append(self._logits(step.asked_by(self))), fresh=step.rng(self)
        )
        step.asked_by(self)
        part = JointMean.of(self.values(step, first, seen[0]))
        (value,) = step.comm.means([part])
        step.log(self, value.detach(), joint=True)
        return 0.5 * (total + other) + step.strength(self) * value

    def restore(self) -> None:
        """Nothing was moved."""

    def _logits(self, step: Step) -> Tensor:
        return self._rows(step.logits, step.find("targets"))


__all__ = ["TwoPasses", "symmetric_divergence"]
