"""Holds a policy near a moving average of itself, and rewards entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.output_penalty import LogitRows, softmax_entropy
from lightning_reg.mechanisms.teacher import Teacher

__all__ = ["EMAReferenceKL", "ema_reference_kl"]


def ema_reference_kl(logits: Tensor, reference: Tensor, entropy_bonus: float = 0.0) -> Tensor:
    """``KL(pi || pi_ref) - b H(pi)`` of each row.

    Args:
        logits: (..., C) of the policy ``pi``.
        reference: (..., C) logits of ``pi_ref``; gets no gradient.
        entropy_bonus: ``b``, for each nat of ``H(pi)``.

    Returns:
        (...), in nats.
    """
    log_p = F.log_softmax(logits, dim=-1)
    log_q = F.log_softmax(reference.detach(), dim=-1)
    p = log_p.exp()
    # A class that both exclude has -inf - -inf; without probability it adds nothing.
    gap = (log_p - log_q).masked_fill(log_p == float("-inf"), 0.0)
    divergence = (p * gap).sum(-1)
    return divergence - entropy_bonus * softmax_entropy(logits)


class EMAReferenceKL(Teacher, LogitRows):
    """Adds a KL divergence to a moving average of the model, and an entropy bonus.

    Hou et al. (2025), Advancing Language Model Reasoning through Reinforcement Learning and
    Inference Scaling (T1), arXiv:2501.11651.

    The loss becomes ``L + beta KL(pi || pi_ref) - alpha H(pi)``, both as means over the tokens
    that count. The reference follows the model after each optimizer step, ``theta_ref <- mu
    theta_ref + (1 - mu) theta``: a fixed reference holds training back the more the further it
    gets, a moving one only the faster it goes. The abstract names the entropy bonus and the
    dynamic anchor; that the anchor is a moving average, and this formula, are from memory of the
    paper and not checked against code. All three defaults are ours.

    Args:
        strength: ``beta``; at least 0.
        entropy_bonus: ``alpha / beta``; at least 0.
        decay: ``mu`` in [0, 1]; 1 keeps the weights that training started with.
        ignore_index: tokens with this label do not count; ``None`` keeps all.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``inputs``, ``logits`` and labels are; labels are optional.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: if the module has no ``forward`` that gives logits, or is sharded.

    Note:
        Over ranks: global; the mean runs over the tokens of all ranks, each counting once, for a
        share of the one all-reduce of all means. The average is moved once per optimizer step,
        and is the same on all ranks. Under accumulation each micro-batch takes its own mean,
        which equals the joint one if they keep equally many tokens. Cost: a forward pass without
        gradients each step, a second copy of the weights, in checkpoints too, and an update of
        it. The reference answers in eval mode: with dropout the divergence is above 0 from
        the start.

        It hurts where rewards are sparse and ``alpha`` is large: entropy is then all there is to
        gain. For the bonus alone ``EntropyPenalty(alpha, direction="maximize")`` needs no copy.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import EMAReferenceKL
        >>> anchor = EMAReferenceKL(0.01, entropy_bonus=0.1, decay=0.99)
        >>> trainer = L.Trainer(callbacks=[anchor], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Advancing Language Model Reasoning through Reinforcement Learning and Inference "
            "Scaling",
            "Hou et al.",
            2025,
            "2501.11651",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    reads: ClassVar[frozenset[str]] = frozenset({"logits"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(ema_reference_kl)
    explanation: ClassVar[str] = "holds outputs near those of a moving average of the weights"

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        entropy_bonus: float = 0.1,
        decay: float = 0.99,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            source="ema",
            decay=decay,
            ignore_index=ignore_index,
            class_dim=class_dim,
            signals=signals,
            name=name,
        )
        cure = "EMAReferenceKL(0.01, entropy_bonus=0.1)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "entropy_bonus", entropy_bonus, 0, cure=cure)
        self.entropy_bonus = entropy_bonus

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        targets = step.find("targets")
        policy = self._rows(step.logits, targets)
        reference = self._rows(self.predict(step), targets)
        return JointMean.of(ema_reference_kl(policy, reference, self.entropy_bonus))
