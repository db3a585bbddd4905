"""Trains for one right answer among N draws in place of one, which limits confidence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.criterion import as_distribution, soft_cross_entropy
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces

__all__ = ["DirectCoverageOptimization", "direct_coverage_optimization"]

Unit = Literal["row", "sequence"]
_UNITS = ("row", "sequence")


def direct_coverage_optimization(logits: Tensor, targets: Tensor, n: float = 8.0) -> Tensor:
    """``-log(1 - (1 - p_y)^N)``: minus the log of the chance that ``N`` draws hold the answer.

    Its gradient is that of the cross-entropy times :func:`overconfidence_factor`. Soft labels
    weight the terms of their classes: ``-sum_c q_c log(1 - (1 - p_c)^N)``.

    Args:
        logits: (..., C).
        targets: (...) class indices, or (..., C) distributions.
        n: ``N`` from 1, the number of draws; 1 is the cross-entropy.

    Returns:
        (...), at least 0, in nats.
    """
    nll = -F.log_softmax(logits, dim=-1)
    share = as_distribution(targets, logits)
    # 0 * inf = 0: a class without a share costs nothing, whatever its probability.
    return (share * pass_at_n_loss(nll.masked_fill(share == 0, 0.0), n)).sum(-1)


def pass_at_n_loss(nll: Tensor, n: float) -> Tensor:
    """``-log(1 - (1 - p)^N)`` from ``-log p``, of any shape: tokens' of a sequence add up.

    Exact where ``p`` underflows (``-log p - log N``) and where it rounds to 1 (0).
    """
    loss: Tensor = _PassAtN.apply(nll, n)  # type: ignore[no-untyped-call]
    return loss


def overconfidence_factor(nll: Tensor, n: float) -> Tensor:
    """``F = N (1 - p)^(N - 1) p / (1 - (1 - p)^N)``, in [0, 1]: near 1 for ``p`` below ``1 / N``.

    Args:
        nll: ``-log p``, of any shape.
        n: ``N`` from 1.
    """
    if n == 1:
        return torch.ones_like(nll)
    p = _probability(nll)
    return n * torch.exp((n - 1) * torch.log1p(-p)) / _coverage_ratio(p, n)


class _PassAtN(torch.autograd.Function):
    """The value by one formula and its slope by another: each cancels where the other is exact."""

    @staticmethod
    def forward(ctx: Any, nll: Tensor, n: float) -> Tensor:
        ctx.save_for_backward(nll)
        ctx.n = n
        if n == 1:
            return nll.clone()
        return (nll - _coverage_ratio(_probability(nll), n).log()).clamp_min(0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (nll,) = ctx.saved_tensors
        return grad * overconfidence_factor(nll, ctx.n), None


def _probability(nll: Tensor) -> Tensor:
    # Inside (0, 1): log(1 - p) and the division by p stay finite.
    bounds = torch.finfo(nll.dtype)
    return torch.exp(-nll).clamp(bounds.tiny, 1 - bounds.eps)


def _coverage_ratio(p: Tensor, n: float) -> Tensor:
    """``(1 - (1 - p)^N) / p``, from ``N`` at 0 to 1 at 1."""
    return -torch.expm1(n * torch.log1p(-p)) / p


class DirectCoverageOptimization(LossReplacement):
    """Trains for pass@N, one right answer among N draws, instead of pass@1 (DCO).

    Chen, Raventos, Cheng, Ganguli, Druckmann (2025), Rethinking Fine-Tuning when Scaling
    Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning, arXiv:2502.07154.

    ``L_N = -log(1 - (1 - p(y|x))^N)``, in nats. Its gradient is ``F`` times that of the
    cross-entropy, ``F = N (1 - p)^(N-1) p / (1 - (1 - p)^N)``: 1 while ``p`` is far below
    ``1/N``, and 0 when the answer is sure enough to be among ``N`` draws. So confidence stops to
    grow early, and where several answers occur, each keeps a share: labels (.7, .2, .1) are best
    predicted by (.51, .30, .19) for ``N = 4`` and by (.38, .33, .29) for ``N = 16``.

    Confirmed against allanraventos/refine (refine/training/loss_functions.py), which multiplies
    the cross-entropy by the detached ``F``: the same gradient; the value here is ``L_N``. For
    ``N p < 0.1`` it takes a series for ``F``, which is right to 1e-4; here ``F`` is exact.

    ``unit="sequence"`` is the paper's loss for language models: ``p`` is that of the whole
    answer, the product over the tokens that carry a label, and the loss is a mean over sequences
    of a *sum* over tokens (as there), which is larger than a mean over tokens. ``unit="row"``
    takes each row, pixel or token by itself. The number of draws is that of your test time; the
    default 8 is ours. ``reg/direct_coverage_optimization_factor`` shows the mean ``F``.

    Args:
        strength: the share of the new loss, in [0, 1]; the rest stays the cross-entropy.
        n: ``N``, from 1, need not be whole; 1 (with ``unit="row"``) is the cross-entropy.
        unit: ``"row"`` or ``"sequence"``.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy, ``"term"`` if that is one
            of its terms, ``"loss"`` to drop whatever it is.
        signals: where ``logits`` and ``targets`` are, if not in the usual places. Logits and
            tokens have to be shifted against each other already.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if ``unit="sequence"`` and there is one label per
            sample, or a soft one.

    Note:
        Over ranks: global; a mean over rows, or over sequences that have a labelled token, for
        which nothing is communicated. Cost: a log-softmax and some elementwise operations on the
        logits; for sequences a sum by sequence.

        It hurts pass@1 where ``N`` is large: predictions are underconfident by design, and so is
        what a calibration metric says of them.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import DirectCoverageOptimization
        >>> trainer = L.Trainer(callbacks=[DirectCoverageOptimization(n=16)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves "
            "Mathematical Reasoning",
            "Chen et al.",
            2025,
            "2502.07154",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(direct_coverage_optimization)
    explanation: ClassVar[str] = "replaces the cross-entropy by -log of the chance in N draws"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        n: float = 8.0,
        unit: Unit = "row",
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        cure = "DirectCoverageOptimization(n=8)"
        check_range(self, "n", n, 1, math.inf, high_open=True, cure=cure)
        if unit not in _UNITS:
            raise ArgumentError(
                self,
                f"`unit` must be one of {', '.join(_UNITS)}, got {unit!r}",
                cure='DirectCoverageOptimization(unit="row")',
            )
        self.n = n
        self.unit = unit

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss of each row; a sequence's is spread evenly over its rows."""
        nll = soft_cross_entropy(logits, distribution)
        if self.unit == "row":
            self._report(step, nll)
            return direct_coverage_optimization(logits, distribution, self.n)
        member, tokens = self._sequences(step, len(logits), nll)
        per_sequence = torch.zeros_like(tokens).index_add(0, member, nll)
        labelled = tokens > 0
        self._report(step, per_sequence, labelled.to(nll))
        # The mean over rows, which follows, is then the mean over sequences.
        share = len(logits) / (tokens * labelled.sum().clamp_min(1)).clamp_min(1)
        return (pass_at_n_loss(per_sequence, self.n) * share)[member]

    def _sequences(self, step: Step, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence (N,) of each labelled row, and how many each of them (B,) has."""
        targets = torch.as_tensor(step.targets)
        if targets.ndim < 2 or targets.is_floating_point():
            raise RegularizationError(
                self,
                'takes the probability of whole sequences (`unit="sequence"`), which needs a '
                f"class per token (B, T); got targets {tuple(targets.shape)} of {targets.dtype}",
                cure='DirectCoverageOptimization(unit="row")',
            )
        classes = step.target_distribution
        assert classes is not None
        kept = (targets >= 0) & (targets < classes.shape[-1])
        position = torch.arange(len(targets), device=targets.device)
        member = position.view(-1, *[1] * (targets.ndim - 1)).expand_as(targets)[kept]
        counts = torch.zeros(len(targets), dtype=like.dtype, device=like.device)
        return member, counts.index_add(0, member, torch.ones_like(like))

    def _report(self, step: Step, nll: Tensor, weights: Tensor | None = None) -> None:
        if step.is_rerun or not step.logging:
            return
        factor = overconfidence_factor(nll.detach(), self.n)
        weights = torch.ones_like(factor) if weights is None else weights
        step.log(self, (factor * weights).sum() / weights.sum().clamp_min(1), "factor")
