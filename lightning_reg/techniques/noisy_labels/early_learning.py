"""Keeps a network at what it learned early, before it memorizes wrong labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import (
    Paper,
    RegularizationError,
    Schedule,
    Signals,
    Step,
    UnsupportedError,
)
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.sample_memory import SampleMemoryRegularizer

__all__ = ["EarlyLearning", "early_learning"]

_CLAMP = 1e-4


def early_learning(logits: Tensor, targets: Tensor) -> Tensor:
    """``log(1 - <p, t>)`` of each sample, with ``p = softmax(logits)`` clamped to [1e-4, 1 - 1e-4].

    Args:
        logits: (B, C); gradients flow through them alone.
        targets: (B, C) ``t``, the moving average of past predictions; each row sums to at most 1.

    Returns:
        (B,), in nats; at most 0, and falling without a bound as ``p`` agrees with a sure ``t``
        but for the clamp, at which the gradient of that class vanishes.
    """
    p = logits.softmax(-1).clamp(_CLAMP, 1 - _CLAMP)
    return torch.log1p(-(p * targets.detach()).sum(-1))


def _moving_average(targets: Tensor, logits: Tensor, beta: float) -> Tensor:
    """``beta t + (1 - beta) p / sum(p)``, of clamped predictions ``p``."""
    p = logits.detach().softmax(-1).clamp(_CLAMP, 1 - _CLAMP)
    return beta * targets + (1 - beta) * p / p.sum(-1, keepdim=True)


class EarlyLearning(SampleMemoryRegularizer):
    """Pulls predictions towards a moving average of the model's own past ones (ELR).

    Liu, Niles-Weed, Razavian, Fernandez-Granda (2020), Early-Learning Regularization Prevents
    Memorization of Noisy Labels, arXiv:2007.00151.

    Networks fit clean labels first and memorize wrong ones later. Each training sample keeps a
    target ``t_i <- beta t_i + (1 - beta) p_i`` (from 0), and the loss becomes
    ``CE + lambda * mean_i log(1 - <p_i, t_i>)``. Its gradient, ``lambda p_j / (1 - <p, t>) *
    sum_k p_k (t_k - t_j)`` for logit ``j``, boosts the class that the model believed in early,
    and cancels the cross-entropy of a label that contradicts it.

    As in the official code (shengliu66/ELR, ELR/model/loss.py): the target takes in the present
    prediction before the loss reads it, predictions are clamped to [1e-4, 1 - 1e-4], what enters
    the average is normalized again, and the gradient does not pass through ``t``. The averages
    of weights and the mixup of its ELR+ variant are techniques of their own.

    Defaults are the official ones for CIFAR-10 with symmetric noise (lambda 3, beta 0.7); those
    for CIFAR-100 are ``strength=7.0, beta=0.9``. The logged value is the mean of
    ``log(1 - <p, t>)`` in nats, at most 0.

    Args:
        strength: ``lambda``, at least 0. While a Schedule is at 0 targets are still averaged.
        beta: the share that a target keeps from step to step of its sample, in [0, 1).
        num_classes: the number of classes; ``None`` takes it from the first logits.
        num_samples: the length of the training set; ``None`` takes it from the dataloader.
        signals: where ``logits`` (and ``sample_index``) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, ``beta`` outside [0, 1) or a size below 1.
        MissingSignalError: in the first step, if the dataset is no ``IndexedDataset``.
        RegularizationError: in the first step, if logits are not (B, C).
        UnsupportedError: if another technique mixes samples, whose predictions are of no sample.

    Note:
        Needs ``IndexedDataset(train_dataset)``; the training step does not notice. Labels are
        not looked at. Over ranks: global; new targets are gathered in each step, so that every
        rank holds the table that one process would have. A sample that occurs twice in one joint
        batch is written once; what a DistributedSampler repeats to fill up is not written at
        all. Under accumulation nothing changes. Cost: a softmax over the logits, a gather of
        B x C numbers, and a table of samples x classes float32 numbers on every device, which
        checkpoints hold as well.

        It hurts with clean labels and a large ``lambda``: hard samples that would be learned
        late are given up. With strong augmentation targets average over views.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import EarlyLearning
        >>> trainer = L.Trainer(callbacks=[EarlyLearning(3.0, beta=0.7)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Early-Learning Regularization Prevents Memorization of Noisy Labels",
            "Liu et al.",
            2020,
            "2007.00151",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits", "sample_index")
    reads: ClassVar[frozenset[str]] = frozenset({"logits"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(early_learning)
    explanation: ClassVar[str] = "keeps predictions near their own moving average, per sample"

    def __init__(
        self,
        strength: float | Schedule = 3.0,
        *,
        beta: float = 0.7,
        num_classes: int | None = None,
        num_samples: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, num_samples=num_samples, width=num_classes, signals=signals, name=name
        )
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="EarlyLearning(strength=3.0)")
        cure = "EarlyLearning(3.0, beta=0.7)"
        check_range(self, "beta", beta, 0, 1, high_open=True, cure=cure)
        self.beta = beta

    def penalty(self, step: Step) -> JointMean:
        """Phase 4: move the targets, then read them."""
        logits = step.logits
        if logits.ndim != 2:
            raise RegularizationError(
                self,
                f"keeps one target per sample and needs logits (B, C), got {tuple(logits.shape)}",
                cure='signals=Signals(logits="module.<name>")',
            )
        if step.is_mixed:
            raise UnsupportedError(
                self,
                "keeps predictions by sample, and the samples of this batch are mixed",
                cure="EarlyLearning(3.0) without Mixup, CutMix or MixSwitch",
            )
        past = self.recall(step, logits.shape[1]).to(logits)
        targets = self.remembered(step, _moving_average(past, logits, self.beta))
        return JointMean.of(early_learning(logits, targets.to(logits)))
