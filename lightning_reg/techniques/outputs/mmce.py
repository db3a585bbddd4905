"""Penalizes miscalibration by a kernel between the confidences of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.labeled_output_penalty import (
    LabeledOutputPenalty,
    confidence_and_correctness,
)

__all__ = ["MMCE", "mmce"]

Weighting = Literal["weighted", "plain"]
_WEIGHTINGS = ("weighted", "plain")
_INSIDE_ROOT = 1e-10


def mmce(
    confidence: Tensor,
    correctness: Tensor,
    weighting: Weighting = "weighted",
    width: float = 0.4,
) -> Tensor:
    """The maximum mean calibration error of a batch: the square root of its kernel estimate.

    With ``k(r, r') = exp(-|r - r'| / width)`` and n rows:

    - ``"plain"`` (MMCE_m): ``sum_ij (c_i - r_i)(c_j - r_j) k(r_i, r_j) / n^2``;
    - ``"weighted"`` (MMCE_w): right and wrong rows count alike, each row with ``u_i = c_i
      (1 - r_i) / n_right - (1 - c_i) r_i / n_wrong``: ``sum_ij u_i u_j k(r_i, r_j)``; 0 if all are
      right or all wrong.

    Args:
        confidence: (n,) ``r``, in [0, 1], with gradients.
        correctness: (n,) ``c``, 0 or 1, or between them for soft labels.
        weighting: which of the two.
        width: of the kernel.

    Returns:
        A scalar, at least 1e-5 if it is not 0: the root is taken of the estimate plus 1e-10.
    """
    right, wrong = correctness.sum(), (1 - correctness).sum()
    if weighting == "plain":
        u = (correctness - confidence) / max(len(confidence), 1)
        present = torch.ones_like(right) if len(confidence) else torch.zeros_like(right)
    else:
        present = ((right > 0) & (wrong > 0)).to(confidence)
        tiny = torch.finfo(confidence.dtype).tiny
        of_right = correctness * (1 - confidence) / right.clamp_min(tiny)
        of_wrong = (1 - correctness) * confidence / wrong.clamp_min(tiny)
        u = of_right - of_wrong
    distance = (confidence.unsqueeze(1) - confidence.unsqueeze(0)).abs()
    estimate = (u.unsqueeze(1) * u.unsqueeze(0) * (-distance / width).exp()).sum()
    # Rounding may leave a positive semi-definite form just below 0.
    return present * (estimate.clamp_min(0) + _INSIDE_ROOT).sqrt()


class MMCE(LabeledOutputPenalty):
    """Penalizes miscalibration by a kernel between the confidences of a batch.

    Kumar, Sarawagi, Jain (2018), Trainable Calibration Measures for Neural Networks from Kernel
    Mean Embeddings (ICML).

    The loss becomes ``CE + lambda MMCE``, with the maximum mean calibration error over the batch:
    the norm of the mean of ``(c - r) k(r, .)``, where ``r`` is the confidence in the predicted
    class and ``c`` whether it is right. It is 0 exactly if, at every confidence, that share is
    right. The weighted estimate counts right and wrong rows alike, since few are wrong once
    training data are fitted. See :func:`mmce`.

    Kernel, root and the 1e-10 inside it are those of the released code (aviralkumar2907/MMCE,
    20ng_mmce.py), and so is the default ``lambda`` of 4. That code divides the weighted sums by the
    numbers of pairs twice (a mean, and again by the numbers), and so do its ports; here as in the
    paper they are divided once.

    Args:
        strength: ``lambda``, at least 0.
        weighting: ``"weighted"`` or ``"plain"``.
        width: of the Laplacian kernel, above 0.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.

    Note:
        Over ranks: global; confidences and correctness of all ranks are gathered, with gradients,
        and the kernel runs over the joint batch. Under accumulation each micro-batch is a batch
        of its own. Cost: a softmax, and a kernel of n x n numbers for n rows of all ranks: not for
        pixels or tokens by the million.

        It hurts with batches of fewer than about a hundred, where the estimate is mostly noise,
        and with a large ``lambda``, which flattens predictions.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MMCE
        >>> trainer = L.Trainer(callbacks=[MMCE(4.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings",
            "Kumar et al.",
            2018,
            None,
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "the kernel runs over the pairs of one micro-batch"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mmce)
    explanation: ClassVar[str] = "penalizes miscalibration by a kernel over the batch's confidences"

    def __init__(
        self,
        strength: float | Schedule = 4.0,
        *,
        weighting: Weighting = "weighted",
        width: float = 0.4,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        if weighting not in _WEIGHTINGS:
            raise ArgumentError(
                self,
                f"`weighting` must be one of {', '.join(_WEIGHTINGS)}, got {weighting!r}",
                cure='MMCE(4.0, weighting="weighted")',
            )
        check_range(self, "width", width, 0, low_open=True, cure="MMCE(4.0, width=0.4)")
        self.weighting = weighting
        self.width = width

    def value(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The error of the joint batch."""
        pair = torch.stack(confidence_and_correctness(logits, distribution), 1)
        confidence, correctness = step.comm.gather(pair).unbind(1)
        return mmce(confidence, correctness.detach(), self.weighting, self.width)
