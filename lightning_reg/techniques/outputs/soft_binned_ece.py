"""Penalizes the calibration error of a batch, in bins that predictions belong to by degrees."""

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

__all__ = ["SoftBinnedECE", "soft_binned_ece"]

Variant = Literal["binned", "label_binned"]
_VARIANTS = ("binned", "label_binned")
_EPS = 1e-5


def soft_binned_ece(
    confidence: Tensor,
    correctness: Tensor,
    n_bins: int = 15,
    temperature: float = 0.01,
    variant: Variant = "binned",
    lowest: float = 0.0,
) -> Tensor:
    """The soft-binned expected calibration error (l2) of a batch.

    Row i belongs to bin j, with centre ``x_j``, by ``s_ij = softmax_j(-(r_i - x_j)^2 / T)``. With
    ``S_j = sum_i s_ij``, and ``A_j``, ``R_j`` the means of ``c`` and ``r`` weighted by ``s_ij``:

    - ``"binned"``: ``sqrt(sum_j S_j / n (A_j - R_j)^2)``;
    - ``"label_binned"``: ``sqrt(sum_j sum_i s_ij (A_j - r_i)^2 / n)``, which only replaces labels
      by their bin's mean. The weights are first mixed with a share 1e-5 of uniform ones.

    Args:
        confidence: (n,) ``r``, in [0, 1], with gradients.
        correctness: (n,) ``c``, 0 or 1, or between them for soft labels.
        n_bins: the number of bins over [``lowest``, 1].
        temperature: ``T``; towards 0 the bins become hard.
        variant: which of the two.
        lowest: where bins begin.

    Returns:
        A scalar in [0, 1]; 0 for no rows.
    """
    sums = _bin_sums(confidence, correctness, n_bins, temperature, variant, lowest)
    return _error(sums, variant)


def _bin_sums(
    confidence: Tensor,
    correctness: Tensor,
    n_bins: int,
    temperature: float,
    variant: Variant,
    lowest: float,
) -> Tensor:
    """Sums over rows of ``s``, ``s c``, ``s r`` and ``s r^2`` (4, n_bins)."""
    edges = torch.linspace(lowest, 1, n_bins + 1, dtype=confidence.dtype, device=confidence.device)
    centres = (edges[1:] + edges[:-1]) / 2
    distance = confidence.unsqueeze(1) - centres
    shares = (-distance.square() / temperature).softmax(1)
    if variant == "label_binned":
        shares = (1 - _EPS) * shares + _EPS / n_bins
    ones = torch.ones_like(confidence)
    return torch.stack([ones, correctness, confidence, confidence.square()]) @ shares


def _error(sums: Tensor, variant: Variant) -> Tensor:
    total, right, confidence, squared = sums
    if variant == "binned":
        share = total.clamp_min(_EPS)
        gap = (right - confidence) / share
        square = (total * gap.square()).sum()
    else:
        mean = right / total.clamp_min(torch.finfo(total.dtype).tiny)
        square = (mean.square() * total - 2 * mean * confidence + squared).sum()
    square = square / total.sum().clamp_min(torch.finfo(total.dtype).tiny)
    # The root has no gradient at 0, where there is nothing left to lower.
    positive = square > 0
    return torch.where(positive, square.where(positive, torch.ones_like(square)).sqrt(), 0.0)


class SoftBinnedECE(LabeledOutputPenalty):
    """Penalizes the calibration error of a batch, in bins that predictions belong to by degrees.

    Karandikar, Cain, Tran, Lakshminarayanan, Shlens, Mozer, Roelofs (2021), Soft Calibration
    Objectives for Neural Networks, arXiv:2108.00106.

    The loss becomes ``CE + beta SB-ECE``: the expected calibration error in the l2 norm, with
    softmax weights in place of bin membership, so that it has a gradient by the confidences. See
    :func:`soft_binned_ece`. Confirmed against the released code (google/uncertainty-baselines,
    experimental/caltrain/secondary_losses.py): bins over [0, 1] and a floor of 1e-5 under a bin's
    weight for ``"binned"``, bins over [1/C, 1] for ``"label_binned"``, whose square that code
    returns and whose root is equation 12 of the paper; 15 bins. It tunes ``beta`` and ``T`` for
    each data set; the defaults 1 and 0.01 are ours.

    Args:
        strength: ``beta``, at least 0.
        n_bins: the number of bins.
        temperature: ``T``, above 0.
        variant: ``"binned"``, or ``"label_binned"``.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.

    Note:
        Over ranks: global; the bins' sums are added up over ranks, with gradients, before the
        error is taken: one all-reduce of 4 x ``n_bins`` numbers. Under accumulation each
        micro-batch is a batch of its own. Cost: a softmax over the logits, and n x ``n_bins``
        numbers.

        It hurts with small batches, whose error is above 0 by chance in every bin and pulls all
        confidences together.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SoftBinnedECE
        >>> trainer = L.Trainer(callbacks=[SoftBinnedECE(1.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Soft Calibration Objectives for Neural Networks",
            "Karandikar et al.",
            2021,
            "2108.00106",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {"accumulation": "the bins are those of one micro-batch"}
    function: ClassVar[Callable[..., Any] | None] = staticmethod(soft_binned_ece)
    explanation: ClassVar[str] = "penalizes the calibration error of the batch, in soft bins"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        n_bins: int = 15,
        temperature: float = 0.01,
        variant: Variant = "binned",
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
            raise ArgumentError(
                self,
                f"`n_bins` must be a whole number from 1, got {n_bins!r}",
                cure="SoftBinnedECE(1.0, n_bins=15)",
            )
        cure = "SoftBinnedECE(1.0, temperature=0.01)"
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        if variant not in _VARIANTS:
            raise ArgumentError(
                self,
                f"`variant` must be one of {', '.join(_VARIANTS)}, got {variant!r}",
                cure='SoftBinnedECE(1.0, variant="binned")',
            )
        self.n_bins = n_bins
        self.temperature = temperature
        self.variant: Variant = variant

    def value(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The error of the joint batch."""
        confidence, correctness = confidence_and_correctness(logits, distribution)
        lowest = 0.0 if self.variant == "binned" else 1 / logits.shape[1]
        sums = _bin_sums(
            confidence, correctness, self.n_bins, self.temperature, self.variant, lowest
        )
        return _error(step.comm.reduce(sums), self.variant)
