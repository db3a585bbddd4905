"""Draws one of several batch transforms for each batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.closed_loop import ClosedLoop
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.batch_transform import (
    MIXING_EXEMPTIONS,
    BatchTransform,
    Replaces,
    Transformed,
)

__all__ = ["MixSwitch"]


class MixSwitch(BatchTransform):
    """Transforms each batch with one of several mixers, drawn anew for each batch.

    Mixed samples cannot be mixed again, so Mixup and CutMix side by side are refused; this is
    how to use both. Common practice in image classification (with equal shares, ``Mixup(0.8)``
    and ``CutMix(1.0)`` for vision transformers); no paper of its own. The mixers are those of
    Zhang et al. (2017), arXiv:1710.09412, and Yun et al. (2019), arXiv:1905.04899, among others.

    What happens to labels is what the mixers say: class indices stay in the batch, and the loss
    is the cross-entropy of the captured logits with the mixed labels; float targets are mixed in
    the batch.

    Args:
        mixers: two or more of :class:`Mixup`, :class:`CutMix`, :class:`Cutout` and the like.
            Each keeps its own ``probability``: of acting on a batch that fell to it.
        probabilities: the share of batches that falls to each mixer; they sum to 1. Default:
            equal shares.
        probability: of transforming a batch at all: a number in [0, 1] or a :class:`Schedule`;
            0 turns the technique off.
        replaces: see :class:`Mixup`; it holds for all mixers.
        signals: where ``inputs``, ``targets`` and ``logits`` are, for all mixers.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if there are fewer than two mixers, if one of them is no batch transform
            or has ``signals`` or ``replaces`` of its own, or if ``probabilities`` do not fit.

    Note:
        Over ranks: local; each rank draws its own mixer for each micro-batch. No collective.
        Cost: that of the mixer that was drawn.

        ``reg/mix_switch`` logs the share of labels (with :class:`Cutout`, of area) that was
        replaced.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import CutMix, MixSwitch, Mixup
        >>> trainer = L.Trainer(callbacks=[MixSwitch([Mixup(0.2), CutMix(1.0)])], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("mixup: Beyond Empirical Risk Minimization", "Zhang et al.", 2017, "1710.09412"),
        Paper(
            "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
            "Yun et al.",
            2019,
            "1905.04899",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = {
        **MIXING_EXEMPTIONS,
        "formula": "it computes nothing of its own: the mixer that was drawn does",
        "gradient": "it computes nothing of its own: the mixer that was drawn does",
    }
    explanation: ClassVar[str] = (
        "one of its mixers a batch; class indices stay in the batch for your metrics, and the "
        "loss is the cross-entropy of the captured logits with the mixed labels; float targets "
        "are mixed in the batch"
    )

    def __init__(
        self,
        mixers: Sequence[BatchTransform],
        *,
        probabilities: Sequence[float] | None = None,
        probability: float | Schedule = 1.0,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(probability, replaces=replaces, signals=signals, name=name)
        self.mixers = list(mixers)
        self._check_mixers()
        shares = [1 / len(self.mixers)] * len(self.mixers)
        self.probabilities = shares if probabilities is None else list(probabilities)
        self._check_probabilities()

    def transform(
        self, inputs: Tensor, chosen: Tensor, generator: torch.Generator, step: Step
    ) -> Transformed:
        """Let one mixer transform the batch."""
        draw = float(torch.rand((), generator=generator, dtype=torch.float64))
        reached = itertools.accumulate(self.probabilities)
        fitting = [m for m, end in zip(self.mixers, reached, strict=True) if draw < end]
        # Probabilities may sum to a rounding error less than 1.
        mixer = fitting[0] if fitting else self.mixers[-1]
        result = mixer.draw(inputs, generator, step)
        return Transformed(inputs, 0.0) if result is None else result

    def _check_mixers(self) -> None:
        cure = "MixSwitch([Mixup(0.2), CutMix(1.0)])"
        wrong = [m for m in self.mixers if not isinstance(m, BatchTransform)]
        nested = [m for m in self.mixers if isinstance(m, MixSwitch)]
        if wrong or nested or len(self.mixers) < 2:
            raise ArgumentError(
                self, f"needs two mixers or more in one list, got {self.mixers!r}", cure=cure
            )
        for mixer in self.mixers:
            if mixer.signals is not None or mixer.replaces != "cross_entropy":
                raise ArgumentError(
                    self,
                    f"its {type(mixer).__name__} has `signals` or `replaces` of its own, which "
                    "hold for all mixers",
                    cure="MixSwitch([...], signals=..., replaces=...)",
                )
            if isinstance(mixer.strength, ClosedLoop):
                raise ArgumentError(
                    self,
                    f"the probability of its {type(mixer).__name__} follows a metric, which only "
                    "that of MixSwitch itself can",
                    cure="MixSwitch([...], probability=ClosedLoop(...))",
                )

    def _check_probabilities(self) -> None:
        cure = "MixSwitch([Mixup(0.2), CutMix(1.0)], probabilities=[0.5, 0.5])"
        for share in self.probabilities:
            check_range(self, "probabilities", share, 0, 1, cure=cure)
        fits = len(self.probabilities) == len(self.mixers)
        if not fits or abs(sum(self.probabilities) - 1) > 1e-6:
            raise ArgumentError(
                self,
                f"`probabilities` must be {len(self.mixers)} numbers that sum to 1, got "
                f"{self.probabilities!r}",
                cure=cure,
            )
