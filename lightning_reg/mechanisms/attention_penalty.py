"""Penalties on attention, as a mean over the samples of all ranks.

A technique supplies :meth:`AttentionPenalty.values`: one number per sample of the logarithms of
one layer's attention. The mechanism takes care of

- capturing attention of any number of layers, also out of a tuple that a layer returns;
- logits or probabilities, in float32 at least, and one layout for both: (B, H, T, S), with a
  single head or query where there is but one;
- the mean over layers, and over the samples of all ranks, each counting once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import MissingSignalError, RegularizationError, Regularizer, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.feature_penalty import check_layer


class AttentionPenalty(Regularizer):
    """Base of penalties on attention.

    Args:
        strength: the multiplier.
        layers: the submodules whose output is or holds attention over its last dimension
            (B, S), (B, H, S) or (B, H, T, S), or ``"outputs.<key>"`` of the dict that
            ``training_step`` returns.
        from_logits: whether that is logits or probabilities; masked keys have ``-inf`` or 0.
        element: which element of a layer's output is the attention, where that is a tuple (1 for
            ``nn.MultiheadAttention``).
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("features",)
    reads: ClassVar[frozenset[str]] = frozenset({"features"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        layers: str | Sequence[str],
        from_logits: bool,
        element: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, name=name)
        owner = type(self).__name__
        names = (layers,) if isinstance(layers, str) else tuple(layers)
        if not names or not all(isinstance(n, str) and n for n in names):
            raise ArgumentError(
                self,
                f"`layers` must name the submodules that return attention, got {layers!r}",
                cure=f'{owner}(layers=["encoder.attention"], from_logits=True)',
            )
        if not isinstance(from_logits, bool):
            raise ArgumentError(
                self,
                f"`from_logits` must be True or False, got {from_logits!r}: it is never guessed",
                cure=f'{owner}(layers="attention", from_logits=False)',
            )
        if element is not None and (not isinstance(element, int) or isinstance(element, bool)):
            raise ArgumentError(
                self,
                f"`element` must be a whole number or None, got {element!r}",
                cure=f'{owner}(layers="attention", from_logits=False, element=1)',
            )
        self.layers = names
        self.from_logits = from_logits
        self.element = element

    @abstractmethod
    def values(self, logs: Tensor, step: Step) -> Tensor:
        """The penalty (B,) of each sample, from one layer's log-attention (B, H, T, S)."""

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a layer that is not there."""
        for layer in self.layers if pl_module.automatic_optimization else ():
            if not layer.startswith("outputs."):
                check_layer(self, layer, pl_module)

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        layers = [self.values(self._logs(step, layer), step) for layer in self.layers]
        return JointMean.of(torch.stack(layers).mean(0))

    def _logs(self, step: Step, layer: str) -> Tensor:
        attention = self._attention(step, layer)
        if not 2 <= attention.ndim <= 4:
            raise RegularizationError(
                self,
                "needs attention (B, S), (B, H, S) or (B, H, T, S), got "
                f"{tuple(attention.shape)} from {layer!r}",
                cure="attention.view(batch, heads, queries, keys)",
            )
        while attention.ndim < 4:
            attention = attention.unsqueeze(-2)
        if self.from_logits:
            return F.log_softmax(attention, dim=-1)
        # The logarithm of 0 has no gradient: a key without weight stays as it is.
        return (
            attention.clamp_min(torch.finfo(attention.dtype).tiny)
            .log()
            .where(attention > 0, attention.new_full((), -torch.inf))
        )

    def _attention(self, step: Step, layer: str) -> Tensor:
        features = step.given.get("features")
        given = isinstance(features, Mapping) and layer in features
        if self.element is None or given or layer.startswith("outputs."):
            return step.feature(layer)
        calls: Sequence[Any] = step.records.get(layer, ())
        parts = calls[0] if len(calls) == 1 else None
        whole = isinstance(parts, (tuple, list)) and -len(parts) <= self.element < len(parts)
        if not whole or not isinstance(parts[self.element], Tensor):  # type: ignore[index]
            raise MissingSignalError(
                self,
                f"takes `features` from element {self.element} of what {layer!r} returns, and saw "
                f"{len(calls)} calls in the first {step.hook}, the last with "
                f"{type(calls[-1]).__name__ if calls else 'nothing'}",
                cure=f'{type(self).__name__}(layers="<a layer that returns (output, attention)>", '
                "element=1)",
            )
        return full_precision(parts[self.element])  # type: ignore[index]


def attention_entropies(logs: Tensor) -> Tensor:
    """The entropy over the last dimension, from log-attention; a key at ``-inf`` adds nothing.

    Args:
        logs: (..., S).

    Returns:
        (...), in nats.
    """
    kept = logs.masked_fill(logs == -torch.inf, 0.0)
    return -(logs.exp() * kept).sum(-1)


__all__ = ["AttentionPenalty", "attention_entropies"]
