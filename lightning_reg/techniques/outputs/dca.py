"""Pulls the mean confidence of a batch towards its accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.mechanisms.labeled_output_penalty import (
    LabeledOutputPenalty,
    confidence_and_correctness,
    joint_mean,
)

__all__ = ["DCA", "dca"]


def dca(confidence: Tensor, accuracy: Tensor) -> Tensor:
    """``|mean_i r_i - mean_i c_i|``.

    Args:
        confidence: the mean confidence of a batch in its predicted classes, with a gradient.
        accuracy: the share of right ones among them.

    Returns:
        A scalar in [0, 1].
    """
    return (confidence - accuracy).abs()


class DCA(LabeledOutputPenalty):
    """Pulls the mean confidence of a batch towards its accuracy.

    Liang, Zhang, Wang, Jacobs (2020), Improved Trainable Calibration Method for Neural Networks on
    Medical Imaging Classification, arXiv:2009.04057.

    The loss becomes ``CE + beta |mean_i r_i - mean_i c_i|`` with the confidence ``r`` in the
    predicted class, and ``c`` whether it is right: the cross-entropy goes on falling as
    confidence passes accuracy, and this does not let it. Only confidences have a gradient.
    Confirmed against the released code (GB-TonyLiang/DCA, loss_fn.py), whose default ``beta`` of 10
    is taken here.

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
        Over ranks: global; both means are those of all ranks, with gradients, before the absolute
        value: one all-reduce of 3 numbers. Under accumulation each micro-batch is a batch of its
        own. Cost: a softmax over the logits.

        It hurts where over- and underconfidence cancel: it sees their mean alone; and with small
        batches, whose accuracy is mostly noise. :class:`MDCA` looks at every class.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import DCA
        >>> trainer = L.Trainer(callbacks=[DCA(10.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Improved Trainable Calibration Method for Neural Networks on Medical Imaging "
            "Classification",
            "Liang et al.",
            2020,
            "2009.04057",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "the means are those of one micro-batch"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(dca)
    explanation: ClassVar[str] = "pulls the batch's mean confidence towards its accuracy"

    def __init__(
        self,
        strength: float | Schedule = 10.0,
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
        pair = torch.stack(confidence_and_correctness(logits, distribution), 1)
        return dca(*joint_mean(step, pair))
