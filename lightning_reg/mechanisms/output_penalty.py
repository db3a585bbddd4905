"""Penalties on the predicted distribution, as a mean over samples, pixels or tokens.

A technique supplies :meth:`OutputPenalty.values`: one number per row of logits. The mechanism
takes care of

- finding the logits, in float32 at least, and of their layout: (B, C), (B, T, C), (B, C, H, W);
- leaving out positions that the labels mark as ignored (padding tokens, unlabeled pixels);
- the mean over all ranks, each position counting once, also where ranks keep unequal numbers of
  them (a mean per rank would weight the positions of a short batch more).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import RegularizationError, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.technique import Semantics


def softmax_entropy(logits: Tensor) -> Tensor:
    """The entropy of ``softmax(logits)`` over the last dimension, in nats.

    ``H(p) = -sum_c p_c log p_c``, from the log-softmax, so that neither large logits nor a class
    that is masked with ``-inf`` gives NaN, in the value or the gradient
    ``dH/dz_c = -p_c (log p_c + H)``.

    Args:
        logits: (..., C).

    Returns:
        (...), in [0, log C].
    """
    log_p = F.log_softmax(logits, dim=-1)
    p = log_p.exp()
    # 0 log 0 = 0: the class has no probability and takes no gradient.
    log_p = log_p.masked_fill(log_p == -torch.inf, 0.0)
    return -(p * log_p).sum(-1)


class LogitRows(Regularizer):
    """Base of techniques that read logits as rows (N, C) of the positions that count.

    Args:
        strength: the multiplier.
        ignore_index: positions with this integer label are left out; ``None`` keeps all.
            Labels are optional: without them every position counts.
        class_dim: where the classes lie in logits of more than two dimensions. By default it
            follows from the shape of the labels.
        signals: where logits and labels are, if not in the usual places.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    reads: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        for argument, value in (("ignore_index", ignore_index), ("class_dim", class_dim)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ArgumentError(
                    self,
                    f"`{argument}` must be a whole number or None, got {value!r}",
                    cure=f"{type(self).__name__}({argument}=None)",
                )
        self.ignore_index = ignore_index
        self.class_dim = class_dim

    def _rows(self, logits: Tensor, targets: Any) -> Tensor:
        """Logits (N, C) of the positions that count."""
        labels: Tensor | None = targets if _are_labels(targets) else None
        class_dim = self._class_dim(logits, labels)
        classes_last = logits.movedim(class_dim, -1)
        if classes_last.shape[-1] < 2:
            raise RegularizationError(
                self,
                f"needs the scores of two classes or more, got logits {tuple(logits.shape)}",
                cure="signals=Signals(logits=lambda step: "
                'F.pad(step.outputs["logits"], (1, 0)))  # softmax of (0, z) is sigmoid(z)',
            )
        rows = classes_last.reshape(-1, classes_last.shape[-1])
        if labels is None or self.ignore_index is None:
            return rows
        if labels.shape != classes_last.shape[:-1]:
            return rows
        return rows[labels.reshape(-1) != self.ignore_index]

    def _class_dim(self, logits: Tensor, labels: Tensor | None) -> int:
        if logits.ndim < 2:
            raise RegularizationError(
                self,
                f"needs logits (B, C) or with more dimensions, got {tuple(logits.shape)}",
                cure='return {"loss": loss, "logits": logits} from training_step',
            )
        if self.class_dim is not None:
            if not -logits.ndim <= self.class_dim < logits.ndim:
                raise ArgumentError(
                    self,
                    f"`class_dim` is {self.class_dim}, but logits are {tuple(logits.shape)}",
                    cure=f"{type(self).__name__}(class_dim=1)",
                )
            return self.class_dim
        if logits.ndim == 2:
            return 1
        if labels is not None and labels.shape == logits.shape[:-1]:
            return -1
        if labels is not None and labels.shape == logits.shape[:1] + logits.shape[2:]:
            return 1
        raise RegularizationError(
            self,
            f"cannot tell which dimension of the logits {tuple(logits.shape)} holds the classes",
            cure=f"{type(self).__name__}(class_dim=1)",
        )


class OutputPenalty(LogitRows):
    """Base of penalties that are a mean over the rows of logits; arguments of `LogitRows`."""

    @abstractmethod
    def values(self, logits: Tensor) -> Tensor:
        """The penalty (N,) of each row of logits (N, C); N may be 0."""

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        return JointMean.of(self.values(self._rows(step.logits, step.find("targets"))))


def _are_labels(targets: Any) -> bool:
    return isinstance(targets, Tensor) and not targets.is_floating_point()


__all__ = ["LogitRows", "OutputPenalty", "softmax_entropy"]
