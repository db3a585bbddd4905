"""Penalizes confident predictions: low entropy of the softmax adds to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.output_penalty import OutputPenalty, softmax_entropy

__all__ = ["ConfidencePenalty", "confidence_penalty"]


def confidence_penalty(logits: Tensor, threshold: float | None = None) -> Tensor:
    """``-H(p)`` of each row, or ``max(0, Gamma - H(p))`` with a threshold ``Gamma``.

    Args:
        logits: (..., C); the classes are on the last dimension.
        threshold: ``Gamma`` in nats; a distribution with more entropy is left alone.

    Returns:
        (...), in nats: in [-log C, 0] without a threshold, in [0, ``Gamma``] with one.
    """
    entropy = softmax_entropy(logits)
    return -entropy if threshold is None else (threshold - entropy).clamp_min(0)


class ConfidencePenalty(OutputPenalty):
    """Penalizes confident predictions, as an entropy bonus in reinforcement learning does.

    Pereyra, Tucker, Chorowski, Kaiser, Hinton (2017), Regularizing Neural Networks by Penalizing
    Confident Output Distributions, arXiv:1701.06548.

    The loss becomes ``-log p(y|x) - beta H(p(.|x))`` with ``H(p) = -sum_c p_c log p_c`` in nats,
    averaged over samples (pixels, tokens). With a threshold ``Gamma`` only predictions that are
    surer than that are penalized: ``+ beta max(0, Gamma - H(p))``. The formula is from memory of
    the paper and not checked against official code, of which none was found; the paper prints
    the hinge with a minus sign, which would reward confidence, so the sign here is the one that
    its text describes.

    The paper looked for ``beta`` between 0.1 and 8 by task; the default 0.1 is the weak end, ours.

    Args:
        strength: ``beta``, at least 0.
        threshold: ``Gamma`` in nats, below ``log C``; ``None`` penalizes all confidence. A low
            threshold acts late in training, once predictions have become sure.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are; targets are optional.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``threshold`` is not above 0, or ``strength`` is below 0.
        RegularizationError: in the first step, if there are fewer than two classes.

    Note:
        Over ranks: global; the mean runs over the positions of all ranks, each counting once, for
        one all-reduce of two numbers a step. Under accumulation each micro-batch takes its own
        mean, which equals the joint one if they keep equally many positions. Cost: a
        log-softmax and one product over the logits.

        It hurts where labels are clean and the confidence is earned: the loss can no longer reach
        its minimum, and probabilities of easy samples come out too low. It does for the entropy
        what label smoothing does for the labels (the divergence to the uniform distribution,
        taken the other way round), so use one of them. :class:`EntropyPenalty` has the opposite
        sign.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ConfidencePenalty
        >>> trainer = L.Trainer(callbacks=[ConfidencePenalty(0.1)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Regularizing Neural Networks by Penalizing Confident Output Distributions",
            "Pereyra et al.",
            2017,
            "1701.06548",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(confidence_penalty)
    explanation: ClassVar[str] = "raises the entropy of the predictions"

    def __init__(
        self,
        strength: float | Schedule = 0.1,
        *,
        threshold: float | None = None,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        if not isinstance(strength, Schedule):
            cure = 'EntropyPenalty(0.1, direction="minimize")  # rewards confidence'
            check_range(self, "strength", strength, 0, cure=cure)
        if threshold is not None:
            cure = "ConfidencePenalty(0.1, threshold=0.5)"
            check_range(self, "threshold", threshold, 0, low_open=True, cure=cure)
        self.threshold = threshold

    def values(self, logits: Tensor) -> Tensor:
        """The penalty of each row."""
        return confidence_penalty(logits, self.threshold)
