"""Makes predictions under two dropout masks agree, where the model has an opinion at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.mechanisms.output_penalty import softmax_entropy
from lightning_reg.mechanisms.two_passes import TwoPasses, symmetric_divergence

__all__ = ["EntropyGatedRDrop", "entropy_gated_r_drop"]

Gated = Literal["unlabeled", "all"]
_GATED = ("unlabeled", "all")
_TINY = 1e-12


def entropy_gated_r_drop(first: Tensor, second: Tensor, gated: Tensor | None = None) -> Tensor:
    """``g (KL(p_1 || p_2) + KL(p_2 || p_1)) / 2`` of each row, in nats.

    Args:
        first: (N, C) logits under one dropout mask, which the gate reads; gradients flow through
            both, none through the gate.
        second: (N, C) logits under another.
        gated: (N,) rows with a gate; the others have ``g = 1``. By default all have one.

    Returns:
        (N,), at least 0.
    """
    gate = entropy_gate(first.detach())
    if gated is not None:
        gate = torch.where(gated, gate, 1.0)
    return gate * symmetric_divergence(first, second)


def entropy_gate(logits: Tensor) -> Tensor:
    """``g = min(1, max(0, (E_max - E - log E) / E_max))``, falling in the entropy ``E``.

    Args:
        logits: (..., C); ``E_max = log C``.

    Returns:
        (...), 1 for sure predictions, 0 for the uniform one where ``C >= 3``.
    """
    largest = math.log(logits.shape[-1])
    entropy = softmax_entropy(logits)
    return ((largest - entropy - torch.log(entropy + _TINY)) / largest).clamp(0.0, 1.0)


class EntropyGatedRDrop(TwoPasses):
    """R-Drop for unlabeled samples, by how sure the prediction is (the gate of GALAXY).

    He et al. (2021), GALAXY: A Generative Pre-trained Model for Task-Oriented Dialog with
    Semi-Supervised Learning and Explicit Policy Injection, arXiv:2111.14592. Consistency under
    dropout: Liang et al. (2021), R-Drop, arXiv:2106.14448.

    The loss is ``(L_1 + L_2) / 2 + alpha mean_i g_i (KL(p_1 || p_2) + KL(p_2 || p_1)) / 2`` over
    labeled and unlabeled samples. Unlabeled ones may come from elsewhere; those on which the
    prediction is near uniform are left out, by ``g = min(1, max(0, (E_max - E - log E) / E_max))``
    with the entropy ``E`` of the first pass and ``E_max = log C``. Labeled ones have ``g = 1``.

    Confirmed against siat-nlp/GALAXY (galaxy/models/pretrain_unified_transformer.py and
    galaxy/utils/criterions.py): the gate is that of the first pass, takes no gradient and holds
    for samples that are marked as unlabeled; 1e-12 is added to ``E`` in the logarithm; ``alpha``
    is 5 in its pre-training scripts and 1 by default, as here. Its logits are those of several
    labels at once; the softmax of them is taken all the same.

    Unlabeled samples lie in the batch with a label that is no class (-1 or -100), which your loss
    ignores: ``F.cross_entropy(logits, y, ignore_index=-1)``. A batch without targets is unlabeled.
    ``reg/entropy_gated_r_drop_gate`` shows the mean gate.

    Args:
        strength: ``alpha``, at least 0; at 0 there is one pass and nothing changes.
        gated: which samples have a gate: ``"unlabeled"`` or ``"all"``.
        signals: where ``logits`` (B, C) and ``targets`` (B,) are; targets are optional.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if logits are not (B, C).
        UnsupportedError: under manual optimization, and where weights are sharded over ranks.

    Note:
        Over ranks: global; the mean runs over the samples of all ranks, for one all-reduce of two
        numbers a step; each rank and micro-batch draws its own masks. The user's logs, metrics
        and BatchNorm's running statistics are those of the first pass. Cost: a second forward and
        backward pass; the first step of a run takes one more.

        A model that is sure and wrong is kept so: begin with few unlabeled samples, or with a
        Schedule that starts at 0. With two classes the gate of a uniform prediction is 0.53.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import EntropyGatedRDrop
        >>> trainer = L.Trainer(callbacks=[EntropyGatedRDrop(1.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "GALAXY: A Generative Pre-trained Model for Task-Oriented Dialog with Semi-Supervised "
            "Learning and Explicit Policy Injection",
            "He et al.",
            2021,
            "2111.14592",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(entropy_gated_r_drop)
    explanation: ClassVar[str] = "runs each batch under two dropout masks that have to agree"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        gated: Gated = "unlabeled",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, ignore_index=None, signals=signals, name=name)
        if gated not in _GATED:
            raise ArgumentError(
                self,
                f"`gated` must be one of {', '.join(_GATED)}, got {gated!r}",
                cure='EntropyGatedRDrop(gated="unlabeled")',
            )
        self.gated = gated

    def values(self, step: Step, first: Tensor, second: Tensor) -> Tensor:
        """The gated divergence of each sample."""
        gated = self._unlabeled(step, first) if self.gated == "unlabeled" else None
        if step.logging:
            gate = entropy_gate(first.detach())
            kept = torch.ones_like(gate) if gated is None else gated.to(gate)
            step.log(self, (gate * kept).sum() / kept.sum().clamp_min(1), "gate")
        return entropy_gated_r_drop(first, second, gated)

    def _unlabeled(self, step: Step, logits: Tensor) -> Tensor | None:
        if step.logits.ndim != 2:
            raise RegularizationError(
                self,
                "tells unlabeled samples by one label for each, and needs logits (B, C), got "
                f"{tuple(step.logits.shape)}",
                cure='EntropyGatedRDrop(gated="all")',
            )
        targets = step.find("targets")
        if targets is None:
            return None
        targets = torch.as_tensor(targets)
        if targets.is_floating_point():
            return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        return (targets < 0) | (targets >= logits.shape[-1])
