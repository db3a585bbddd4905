"""Lowers confidence in wrong predictions and raises it in right ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.mechanisms.labeled_output_penalty import (
    LabeledOutputPenalty,
    confidence_and_correctness,
    joint_mean,
)

__all__ = ["CorrectnessAwarePenalty", "correctness_aware_penalty"]


def correctness_aware_penalty(confidence: Tensor, correctness: Tensor) -> Tensor:
    """``(r_i - c_i)^2`` of each row.

    Args:
        confidence: (n,) ``r``, the largest probability, with gradients.
        correctness: (n,) ``c``, whether that class is right; a constant.

    Returns:
        (n,), in [0, 1].
    """
    return (confidence - correctness).square()


class CorrectnessAwarePenalty(LabeledOutputPenalty):
    """Lowers confidence in wrong predictions and raises it in right ones.

    Liu, Wang, Zhao, Gould, Zheng (2024), Optimizing Calibration by Gaining Aware of Prediction
    Correctness, arXiv:2404.13016.

    The loss becomes ``CE + lambda sum_i w_i (max_k p_ik - 1[argmax_k p_ik = y_i])^2 / sum_i w_i``.
    Unlike the cross-entropy it does not raise the confidence in a narrow error. ``balanced`` gives
    right and wrong rows the same total weight: ``w`` is the share of wrong rows for right ones, and
    the other way round; if all rows are of one kind nothing is penalized, as there.

    The paper fits a calibrator with it after training: :class:`CorrectnessAwareCalibration`; loss
    and weights are those of its released code (liuyvchi/Correctness-aware-calibration,
    src/cal_metrics/temperature_scaling_CA.py). Training a network with it is ours, with the default
    ``lambda`` of 1, and so is the choice of weights that are all 1, with which the penalty is
    proper for the confidence: its minimum is the probability of being right.

    Args:
        strength: ``lambda``, at least 0.
        balanced: give right and wrong rows the same total weight.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is below 0, or ``balanced`` neither true nor false.

    Note:
        A soft or mixed label counts as right by its share of that class. Over ranks: global; the
        mean, and the shares of right and wrong rows, are those of all
        ranks. Under accumulation shares are those of a micro-batch. Cost: a softmax over the
        logits.

        It hurts with ``balanced`` where nearly all rows are right: a few errors then hold half of
        the weight, and confidences end below the accuracy.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import CorrectnessAwarePenalty
        >>> trainer = L.Trainer(callbacks=[CorrectnessAwarePenalty(1.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Optimizing Calibration by Gaining Aware of Prediction Correctness",
            "Liu et al.",
            2024,
            "2404.13016",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "the shares of right and wrong rows are those of one micro-batch"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(correctness_aware_penalty)
    explanation: ClassVar[str] = "lowers confidence in wrong predictions, raises it in right ones"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        balanced: bool = True,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        if not isinstance(balanced, bool):
            raise ArgumentError(
                self,
                f"`balanced` must be True or False, got {balanced!r}",
                cure="CorrectnessAwarePenalty(1.0, balanced=True)",
            )
        self.balanced = balanced

    def value(self, step: Step, logits: Tensor, distribution: Tensor) -> JointMean:
        """The weighted mean over the joint batch."""
        confidence, right = confidence_and_correctness(logits, distribution)
        values = correctness_aware_penalty(confidence, right)
        if not self.balanced:
            return JointMean.of(values)
        share = joint_mean(step, right.unsqueeze(1))[0]
        return JointMean.of(values, torch.lerp(share.expand_as(right), 1 - share, right))
