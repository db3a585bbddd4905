"""Learns short discrete codes: each tells much of the label, and little of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.criterion import mixed
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.feature_penalty import check_layer

__all__ = ["DiscreteInfomax", "discrete_infomax"]


def discrete_infomax(logits: Tensor, labels: Tensor, independence: float = 1.0) -> Tensor:
    r"""``-sum_i I(c_i; y) + gamma sum_{i != j} I(c_i; c_j)`` of a batch of code probabilities.

    With ``pbar_i`` the mean over the batch of the distribution of entry i, and ``pbar_{i|y}``
    that over the samples of label y: ``I(c_i; y) = H(pbar_i) - E_y H(pbar_{i|y})``. Entries of
    one sample are drawn independently, so that their joint distribution is the mean over samples
    of ``p_i p_j^T``, and ``I(c_i; c_j) = KL(mean p_i p_j^T || pbar_i pbar_j^T)``.

    Args:
        logits: (N, d, k): d entries of k values.
        labels: (N,) integers, or (N, C) shares of classes, of samples that were mixed.
        independence: ``gamma``.

    Returns:
        A scalar, in nats; 0 for an empty batch.
    """
    if len(logits) == 0:
        return 0.0 * logits.sum()
    p = logits.softmax(-1)
    entries = _entropies(p.mean(0))
    information = (entries - _within(p, labels)).sum()
    if logits.shape[1] == 1 or independence == 0:
        return -information
    flat = p.flatten(1)
    d, k = p.shape[1:]
    joint = (flat.T @ flat / len(flat)).view(d, k, d, k)
    pairs = entries[:, None] + entries[None] - _entropies(joint.transpose(1, 2).flatten(2))
    redundancy = pairs.sum() - pairs.diagonal().sum()
    return -information + independence * redundancy


def _within(p: Tensor, labels: Tensor) -> Tensor:
    """The entropy (d,) of each entry given the label."""
    if labels.is_floating_point():
        sizes = labels.sum(0)
        means = torch.einsum("nc,ndk->cdk", labels / sizes.clamp_min(1e-12), p)
        return (sizes[:, None] / len(p) * _entropies(means)).sum(0)
    same = (labels[:, None] == labels[None]).to(p)
    # The mean of each sample's class: its entropy, averaged over samples, is that over labels.
    means = torch.einsum("nm,mdk->ndk", same / same.sum(1, keepdim=True), p)
    return _entropies(means).mean(0)


def _entropies(p: Tensor) -> Tensor:
    """Over the last dimension; a value without probability passes no infinite gradient."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


class DiscreteInfomax(Regularizer):
    """Makes each entry of a discrete code tell the label, and entries independent (DIMCO).

    Lee, Baek, Kim, Hwang (2019), Discrete Infomax Codes for Supervised Representation Learning,
    arXiv:1905.11656.

    A layer gives, for each sample, d distributions over k values. The loss becomes ``L + lambda
    [-sum_i I(c_i; y) + gamma sum_{i != j} I(c_i; c_j)]``, all information estimated from the
    samples of all ranks; ordered pairs count twice. Formula from memory of the paper; not checked
    against code, of which none was found. With d = 1 and k classes it is what cross-entropy
    lowers when the code is the prediction. The default ``gamma`` 1 is ours.

    Args:
        strength: ``lambda``; at least 0.
        layer: the submodule that returns code logits (B, d, k), or (B, d k).
        entries: d.
        independence: ``gamma``; at least 0.
        signals: where ``targets`` are, one integer a sample.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or the module has no such layer.
        RegularizationError: in the first step, if the layer's width is no multiple of d.

    Note:
        A sample that was mixed belongs to its classes by their shares, which is ours. Over ranks:
        global. Codes and labels of all ranks are gathered with gradients, as the
        entropy of a mean is not the mean of ranks' entropies: N ranks equal one process with the
        joint batch. Under accumulation each micro-batch estimates by itself, and small batches
        estimate badly: information is biased upwards by about ``(k - 1)(classes - 1) / 2N`` an
        entry. Cost: products of the (N, d k) probabilities with themselves, and with an N x N
        matrix of equal labels; one gather.

        It hurts with batches in which most labels occur once: every code then tells its label.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import DiscreteInfomax
        >>> codes = DiscreteInfomax(1.0, layer="code", entries=4)
        >>> trainer = L.Trainer(callbacks=[codes], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Discrete Infomax Codes for Supervised Representation Learning",
            "Lee et al.",
            2019,
            "1905.11656",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "information in a batch is not the mean of its micro-batches' information",
    }
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("features", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"features", "targets"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(discrete_infomax)
    explanation: ClassVar[str] = "raises what each entry of a code tells of the label"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        layer: str,
        entries: int,
        independence: float = 1.0,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        cure = 'DiscreteInfomax(1.0, layer="code", entries=4)'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "independence", independence, 0, cure=cure)
        if not isinstance(entries, int) or isinstance(entries, bool) or entries < 1:
            raise ArgumentError(
                self, f"`entries` must be a whole number from 1, got {entries!r}", cure=cure
            )
        if not isinstance(layer, str) or not layer:
            raise ArgumentError(
                self, f"`layer` must be the name of a submodule, got {layer!r}", cure=cure
            )
        self.layer = layer
        self.entries = entries
        self.independence = independence

    @property
    def layers(self) -> tuple[str, ...]:
        """The submodule to capture."""
        return (self.layer,)

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a layer that is not there."""
        if pl_module.automatic_optimization and not self.layer.startswith("outputs."):
            check_layer(self, self.layer, pl_module, also="entries=4, ")

    def penalty(self, step: Step) -> Tensor:
        """Phase 4."""
        codes, labels = self._codes(step.feature(self.layer)), step.targets
        if step.mixes:
            assert step.target_distribution is not None
            classes = step.target_distribution.shape[-1]
            labels = mixed(step, F.one_hot(labels, classes).to(codes))
        elif labels.is_floating_point() or labels.shape != codes.shape[:1]:
            raise RegularizationError(
                self,
                f"needs one integer label a sample, got {labels.dtype} of shape "
                f"{tuple(labels.shape)} for {len(codes)} codes",
                cure='signals=Signals(targets="batch.<key>")',
            )
        codes, labels = step.comm.gather(codes), step.comm.gather(labels)
        return discrete_infomax(codes, labels, self.independence)

    def _codes(self, features: Tensor) -> Tensor:
        rows = features.flatten(1)
        width = rows.shape[1]
        if width % self.entries or width // self.entries < 2:
            raise RegularizationError(
                self,
                f"needs two values or more for each of {self.entries} entries, got features "
                f"{tuple(features.shape)}",
                cure=f'DiscreteInfomax(layer="{self.layer}", entries={max(1, width // 2)})',
            )
        return rows.view(len(rows), self.entries, -1)
