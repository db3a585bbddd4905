"""Keeps the entropy of every attention head near a share of its largest value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Step
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.attention_penalty import AttentionPenalty, attention_entropies

__all__ = ["AttentionEntropyRegularization", "attention_entropy_regularization"]


def attention_entropy_regularization(
    logs: Tensor,
    thresholds: Tensor | float = 0.5,
    margin: float = 0.2,
    context_size: int | None = None,
) -> Tensor:
    r"""``mean_{h,i} 1[|d_hi| > gamma E_max] d_hi^2`` with ``d_hi = E_hi - theta_h E_max``.

    ``E_hi = -sum_j A_hij log A_hij`` is the entropy of query i of head h, ``E_max = log S``.

    Args:
        logs: (B, H, T, S) logarithms of attention; ``-inf`` where a key is masked.
        thresholds: ``theta``, one number or (H,): the share of ``E_max`` that a head is held at.
            Gets a gradient if it asks for one.
        margin: ``gamma``: deviations up to this share of ``E_max`` are free.
        context_size: S in ``E_max``; the number of keys by default.

    Returns:
        (B,), in squared nats, the mean over heads and queries.
    """
    largest = math.log(context_size or logs.shape[-1])
    theta = torch.as_tensor(thresholds, dtype=logs.dtype, device=logs.device).reshape(-1, 1)
    deviation = attention_entropies(logs) - theta * largest
    outside = deviation.detach().abs() > margin * largest
    return torch.where(outside, deviation, 0.0).square().mean((1, 2))


class AttentionEntropyRegularization(AttentionPenalty):
    """Pulls attention entropy into a band: neither on one key nor on all alike.

    Jha, Reagen (2025), Entropy-Guided Attention for Private LLMs, arXiv:2501.03489.

    The loss becomes ``L + lambda 1/L sum_l 1/H sum_h mean_i 1[|d| > gamma E_max] d^2`` with
    ``d = E_lhi - theta_h E_max`` and ``E_max = log S``. Inside the margin there is no gradient;
    at its edge the penalty jumps from 0 to ``(gamma E_max)^2``.

    Confirmed with Nandan91/entropy-guided-attention-llm@728944d (``entropy_regularization.py``),
    from which ``gamma`` 0.2 comes. That *sums* over the batch and the queries and multiplies by
    1e-5; here both are means, so that the strength does not depend on batch and length: its
    coefficient times B T is the strength here. The default 0.01 is ours. The paper trains
    ``theta`` with the weights, one per head; give the name of a parameter of the module for that,
    as in the example. Its learnable softmax temperatures are part of the architecture and not
    of this technique.

    Args:
        strength: ``lambda``; at least 0.
        layers: the submodules that return attention (B, H, T, S), or ``"outputs.<key>"``.
        from_logits: whether they return logits or probabilities; never guessed.
        element: which element of a layer's output, where that is a tuple.
        thresholds: ``theta`` in [0, 1]: a number, or the name of a parameter or buffer of the
            module with one number per head, which all layers share as in the official code.
        margin: ``gamma`` in [0, 1].
        context_size: S in ``E_max``; the number of keys by default.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is none of these, or the module has no such layer or
            parameter.
        MissingSignalError: in the first step, if a layer is not called once.

    Note:
        Over ranks: global; the mean runs over the samples of all ranks, for a share of the one
        all-reduce of all means. Accumulation changes nothing if micro-batches have equally many
        samples. Cost: one logarithm, exponential and product over attention, which has to be
        there: fused attention does not give it.

        It hurts under a causal mask with a high threshold: row i can reach ``log(i + 1)`` only, so
        that early rows are pushed towards what they cannot have.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AttentionEntropyRegularization
        >>> band = AttentionEntropyRegularization(0.01, layers="attention", from_logits=False,
        ...     element=1, thresholds="head_thresholds")  # nn.Parameter(torch.full((heads,), 0.5))
        >>> trainer = L.Trainer(callbacks=[band], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Entropy-Guided Attention for Private LLMs", "Jha & Reagen", 2025, "2501.03489"),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(attention_entropy_regularization)
    explanation: ClassVar[str] = "pulls the entropy of attention into a band"

    def __init__(
        self,
        strength: float | Schedule = 0.01,
        *,
        layers: str | Sequence[str],
        from_logits: bool,
        element: int | None = None,
        thresholds: float | str = 0.5,
        margin: float = 0.2,
        context_size: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, layers=layers, from_logits=from_logits, element=element, name=name
        )
        cure = 'AttentionEntropyRegularization(0.01, layers="attention", from_logits=True)'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        if not isinstance(thresholds, str):
            check_range(self, "thresholds", thresholds, 0, 1, cure=cure)
        check_range(self, "margin", margin, 0, 1, cure=cure)
        if context_size is not None:
            check_range(self, "context_size", context_size, 2, cure=cure)
        self.thresholds = thresholds
        self.margin = margin
        self.context_size = context_size

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a layer or a parameter that is not there."""
        super().validate(trainer, pl_module)
        if isinstance(self.thresholds, str) and self._tensor(pl_module) is None:
            raise ArgumentError(
                self,
                f"`thresholds` is {self.thresholds!r}, and the module has no such parameter",
                cure=f"self.{self.thresholds} = nn.Parameter(torch.full((heads,), 0.5))",
            )

    def values(self, logs: Tensor, step: Step) -> Tensor:
        """The penalty of each sample."""
        theta = self._tensor(step.module) if isinstance(self.thresholds, str) else self.thresholds
        assert theta is not None
        return attention_entropy_regularization(logs, theta, self.margin, self.context_size)

    def _tensor(self, module: pl.LightningModule) -> Tensor | None:
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return named.get(str(self.thresholds))
