"""Keeps attention from resting on a few instances: its entropy is raised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Step
from lightning_reg.mechanisms.attention_penalty import AttentionPenalty, attention_entropies

__all__ = ["AttentionEntropyMaximization", "attention_entropy_maximization"]


def attention_entropy_maximization(logs: Tensor, normalized: bool = False) -> Tensor:
    """``sum_n a_n log a_n`` of each sample: the negative entropy of its attention.

    Args:
        logs: (B, H, T, S) logarithms of attention over the S instances; ``-inf`` where an
            instance is masked.
        normalized: divide by the logarithm of how many instances are not masked, so that bags of
            all sizes have values in [-1, 0]; a bag of one instance has 0.

    Returns:
        (B,), in nats, the mean over heads and queries; from ``-log S`` (all alike) to 0 (one).
    """
    entropy = attention_entropies(logs)
    if normalized:
        size = (logs > -torch.inf).sum(-1).clamp_min(2).to(logs)
        entropy = entropy / size.log()
    return -entropy.mean((1, 2))


class AttentionEntropyMaximization(AttentionPenalty):
    """Raises the entropy of attention, so that a bag is not judged by a few instances (AEM).

    Zhang et al. (2024), AEM: Attention Entropy Maximization for Multiple Instance Learning based
    Whole Slide Image Classification, arXiv:2406.15303.

    The loss becomes ``L + lambda sum_n a_n log a_n`` with the attention ``a_n`` over the
    instances of a bag, averaged over heads as in the official code (dazhangyu123/AEM@4a928a8,
    ``main.py``), and over bags, of which that has one a step. It is computed from the logits:
    weights that are softmaxed once more are never far from uniform. Its README trains with
    ``lambda`` 0.1, the default. The scale grows with ``log S``: with bags of many sizes,
    ``normalized=True`` (ours) makes them count alike.

    Args:
        strength: ``lambda``; negative lowers the entropy.
        layers: the submodules that return attention (B, S), (B, H, S) or (B, H, T, S), or
            ``"outputs.<key>"``.
        from_logits: whether they return logits or probabilities; never guessed. Padding has
            ``-inf`` or 0.
        element: which element of a layer's output, where that is a tuple.
        normalized: divide each entropy by its largest possible value.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is none of these, or the module has no such layer.
        MissingSignalError: in the first step, if a layer is not called once.

    Note:
        Over ranks: global; the mean runs over the bags of all ranks, each counting once, for a
        share of the one all-reduce of all means. Accumulation changes nothing if micro-batches
        have equally many bags. Cost: one logarithm, exponential and product over attention, which
        has to be there: fused attention does not give it.

        It hurts where a single instance decides: too large a strength spreads attention over what
        says nothing. In transformers it acts against attention collapse.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AttentionEntropyMaximization
        >>> aem = AttentionEntropyMaximization(0.1, layers="attention", from_logits=True)
        >>> trainer = L.Trainer(callbacks=[aem], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "AEM: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide "
            "Image Classification",
            "Zhang et al.",
            2024,
            "2406.15303",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(attention_entropy_maximization)
    explanation: ClassVar[str] = "raises the entropy of attention"

    def __init__(
        self,
        strength: float | Schedule = 0.1,
        *,
        layers: str | Sequence[str],
        from_logits: bool,
        element: int | None = None,
        normalized: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, layers=layers, from_logits=from_logits, element=element, name=name
        )
        self.normalized = normalized

    def values(self, logs: Tensor, step: Step) -> Tensor:
        """The negative entropy of each sample."""
        return attention_entropy_maximization(logs, self.normalized)
