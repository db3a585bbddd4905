"""Pulls the mean probability of every class towards the share of its labels in the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.mechanisms.labeled_output_penalty import LabeledOutputPenalty, joint_mean

__all__ = ["MDCA", "mdca"]


def mdca(probability: Tensor, share: Tensor) -> Tensor:
    """``1/K sum_k |mean_i p_ik - mean_i q_ik|``.

    Args:
        probability: (K,) the mean predicted probability of each class over a batch.
        share: (K,) the share of each class among its labels.

    Returns:
        A scalar, from 0 to 2 / K.
    """
    return (probability - share).abs().mean()


class MDCA(LabeledOutputPenalty):
    """Pulls the mean probability of every class towards the share of its labels in the batch.

    Hebbalaguppe, Prakash, Madan, Arora (2022), A Stitch in Time Saves Nine: A Train-Time
    Regularizing Loss for Improved Neural Network Calibration, arXiv:2203.13834.

    The loss becomes ``CE + beta MDCA``, with the multi-class difference of confidence and accuracy
    ``1/K sum_k |1/n sum_i p_ik - 1/n sum_i q_ik|``: calibration in the large for every class, not
    for the predicted one alone, without bins and differentiable almost everywhere. Confirmed
    against the released code (mdca-loss/MDCA-Calibration, solvers/loss.py), where ``beta`` is 1
    by default, as here. The paper adds it to the focal loss as well: :class:`FocalLoss` beside it.

    Args:
        strength: ``beta``, at least 0.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0.

    Note:
        Over ranks: global; the mean probabilities and shares of all ranks are taken, with
        gradients, before the absolute value: one all-reduce of 2 K numbers. Under accumulation
        each micro-batch is a batch of its own. Cost: a softmax over the logits.

        It hurts nothing much, and helps little where classes are many and a batch holds few of
        each: a class that is absent has a share of 0.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MDCA, FocalLoss
        >>> trainer = L.Trainer(callbacks=[MDCA(1.0), FocalLoss(gamma=3.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "A Stitch in Time Saves Nine: A Train-Time Regularizing Loss for Improved Neural "
            "Network Calibration",
            "Hebbalaguppe et al.",
            2022,
            "2203.13834",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "the means are those of one micro-batch"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mdca)
    explanation: ClassVar[str] = "pulls mean probabilities towards the labels' shares, per class"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )

    def value(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The difference over the joint batch."""
        means = joint_mean(step, torch.cat([logits.softmax(1), distribution], 1))
        return mdca(*means.chunk(2))
