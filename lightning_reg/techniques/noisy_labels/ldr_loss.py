"""Replaces the cross-entropy by a loss over the worst weighting of the labels, with a knob."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    RegularizationError,
    Schedule,
    Signals,
    Step,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces
from lightning_reg.mechanisms.sample_memory import SampleMemoryRegularizer, SampleTable

__all__ = ["ALDRLoss", "LDRLoss", "adaptive_lambda", "aldr_loss", "ldr_loss"]

Normalization = Literal["softplus", "l1", "none"]
_NORMALIZATIONS = ("softplus", "l1", "none")
_PAPER = Paper(
    "Label Distributionally Robust Losses for Multi-class Classification: Consistency, "
    "Robustness and Adaptivity",
    "Zhu et al.",
    2023,
    "2112.14869",
)


def ldr_loss(
    scores: Tensor, distribution: Tensor, lam: float | Tensor, margin: float = 0.0
) -> Tensor:
    """``lambda log((1/K) sum_k exp((f_k - f_y + c_k) / lambda))`` of each row (LDR-KL).

    This is ``max_p sum_k p_k (f_k - f_y + c_k) - lambda KL(p || 1/K)`` over distributions ``p``,
    with ``c_k = c`` for the wrong classes and 0 for the right one. For a soft label ``q``,
    ``f_y`` is ``<f, q>`` and ``c_k = c (1 - q_k)``.

    Args:
        scores: (N, K) ``f``.
        distribution: (N, K) the labels, one-hot or soft.
        lam: ``lambda`` in [0, inf], one number or one per row (N,). At 0 the loss is the largest
            margin (Crammer-Singer), at 1 with ``margin`` 0 the cross-entropy minus ``log K``, at
            infinity the mean margin, which is symmetric: summed over all labels it is constant.
        margin: ``c``.

    Returns:
        (N,), at least -log K for ``lam`` 1 and ``margin`` 0; negative values are usual.
    """
    own = (scores * distribution).sum(-1, keepdim=True)
    margins = scores - own + margin * (1 - distribution)
    if not isinstance(lam, Tensor):
        if lam == 0:
            return margins.amax(-1)
        if math.isinf(lam):
            return margins.mean(-1)
        lam = torch.as_tensor(lam, dtype=scores.dtype, device=scores.device)
    # From the largest margin: neither a small lambda overflows nor a large one cancels.
    top = margins.amax(-1, keepdim=True)
    below = torch.expm1((margins - top) / lam.unsqueeze(-1)).mean(-1)
    return top.squeeze(-1) + lam * torch.log1p(below)


def adaptive_lambda(
    scores: Tensor, lam: Tensor, lam_0: float = 1.0, alpha: float = 2.0, iterations: int = 1
) -> Tensor:
    """``lambda <- lambda_0 (1 - KL(p || 1/K) / (alpha log K))`` of each row, ``iterations`` times.

    Here ``p = softmax(f / lambda)``, at the present ``lambda``. Surer predictions get a smaller
    one, down to ``lambda_0 (1 - 1 / alpha)``. From ``lambda_0`` the iterates fall to the largest
    ``lambda`` at which ALDR-KL without a margin is stationary; there is no closed form.

    Args:
        scores: (N, K) ``f``; no gradient flows.
        lam: (N,) the present ``lambda`` of each sample, above 0.
        lam_0: ``lambda_0``, where uniform predictions stay.
        alpha: above 1, so that ``lambda`` stays above 0.
        iterations: at least 1.

    Returns:
        (N,) the next ``lambda``.
    """
    scores, log_k = scores.detach(), math.log(scores.shape[-1])
    for _ in range(iterations):
        log_p = F.log_softmax(scores / lam.unsqueeze(-1), dim=-1)
        divergence = log_k + (log_p.exp() * log_p).sum(-1)
        lam = lam_0 * (1 - divergence / (alpha * log_k))
    return lam


def aldr_loss(
    scores: Tensor,
    distribution: Tensor,
    lam: Tensor,
    lam_0: float = 1.0,
    alpha: float = 2.0,
    margin: float = 1.0,
) -> Tensor:
    """``LDR-KL(lambda_i) - (alpha log K / (2 lambda_0)) (lambda_i - lambda_0)^2`` (ALDR-KL).

    Args:
        scores: (N, K).
        distribution: (N, K) the labels.
        lam: (N,) the ``lambda`` of each sample, above 0; see :func:`adaptive_lambda`.
        lam_0: ``lambda_0``.
        alpha: how firmly ``lambda`` is held at ``lambda_0``.
        margin: ``c``.

    Returns:
        (N,).
    """
    hold = alpha * math.log(scores.shape[-1]) / (2 * lam_0)
    return ldr_loss(scores, distribution, lam, margin) - hold * (lam - lam_0).square()


def _normalized(scores: Tensor, normalization: str) -> Tensor:
    """Scores of mean size one: what makes margin and lambda mean the same for every network."""
    if normalization == "none":
        return scores
    scores = F.softplus(scores) if normalization == "softplus" else scores
    return scores / scores.abs().mean(-1, keepdim=True).clamp_min(1e-12)


class LDRLoss(LossReplacement):
    """Replaces the cross-entropy by the label-distributionally robust loss LDR-KL.

    Zhu, Ying, Yang (2023), Label Distributionally Robust Losses for Multi-class Classification:
    Consistency, Robustness and Adaptivity, arXiv:2112.14869.

    ``lambda log((1/K) sum_k exp((f_k - f_y + c 1[k != y]) / lambda))``: the worst case over label
    weights, held near the uniform ones by ``lambda``. One knob from the Crammer-Singer hinge
    (``lambda`` 0) over the cross-entropy (1, with ``c = 0`` and raw logits, less ``log K``) to
    a symmetric loss that label noise cannot bend (infinity).

    Confirmed with the official code (Optimization-AI/ICML2023_LDR, loss.py): logits go through a
    softplus and are divided by their mean first, and the mean over classes is inside the
    logarithm. The default ``margin`` 2 and ``lam`` 1 are those of its ``LDRLoss_V1``; the paper
    tunes ``lam``. Soft labels are ours.

    Args:
        strength: the share of this loss in [0, 1]; the rest stays the cross-entropy.
        lam: ``lambda`` in [0, inf]. Large: robust to wrong labels, slow to fit.
        margin: ``c``, at least 0.
        normalization: of the logits: ``"softplus"`` (the official loss), ``"l1"`` (division by
            the mean absolute logit, as in the official adaptive loss), or ``"none"``.
        replaces: what of the user's loss goes: see ``LossReplacement``. ``"cross_entropy"``
            (checked), ``"term"`` or ``"loss"``.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if the user's loss is no cross-entropy and
            ``replaces`` does not say what to do.

    Note:
        Over ranks: global, being a mean over samples; nothing is communicated. Cost: one
        exponential per logit, as for the cross-entropy. The learning rate may need to change
        with ``lam`` and ``normalization``, which scale the gradient.

        It hurts with clean labels and a large ``lam``, whose gradient does not grow on samples
        that are wrong. Normalized logits cannot grow their margin by scale, so probabilities
        from their softmax are not calibrated.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import LDRLoss
        >>> trainer = L.Trainer(callbacks=[LDRLoss(lam=10.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (_PAPER,)
    function: ClassVar[Callable[..., Any] | None] = staticmethod(ldr_loss)
    explanation: ClassVar[str] = "replaces the cross-entropy by LDR-KL"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        lam: float = 1.0,
        margin: float = 2.0,
        normalization: Normalization = "softplus",
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        check_range(self, "lam", lam, 0, cure="LDRLoss(lam=1.0)")
        _check_scores(self, margin, normalization)
        self.lam = lam
        self.margin = margin
        self.normalization = normalization

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """LDR-KL of each row."""
        scores = _normalized(logits, self.normalization)
        return ldr_loss(scores, distribution, self.lam, self.margin)


class ALDRLoss(LossReplacement, SampleMemoryRegularizer):
    """Replaces the cross-entropy by ALDR-KL, whose ``lambda`` adapts to each training sample.

    Zhu, Ying, Yang (2023), Label Distributionally Robust Losses for Multi-class Classification:
    Consistency, Robustness and Adaptivity, arXiv:2112.14869.

    :class:`LDRLoss` maximized over ``lambda`` as well, less ``(alpha' / 2) (lambda -
    lambda_0)^2``: samples on which the model is unsure, as on wrong labels, keep a large
    ``lambda``, which is robust; sure ones get a smaller one, which fits. Each sample keeps its
    ``lambda_i`` between epochs: a step moves it to ``lambda_0 (1 - KL(p_i || 1/K) / (alpha log
    K))`` with ``p_i = softmax(f_i / lambda_i)``, then takes the loss at the new one.

    Confirmed with the official code (Optimization-AI/ICML2023_LDR, loss.py, ``ALDRLoss_V1``):
    logits are divided by their mean absolute value, after a softplus for CIFAR-100; ``alpha' =
    alpha log K / lambda_0``; no gradient flows through ``lambda_i``; one update a visit; the
    margin is not part of ``p_i``, as it would be in the exact maximum. It adds 1e-5 to
    probabilities for the logarithm, which a log-softmax makes needless. Soft labels,
    ``iterations`` and ``stored`` are ours. Default ``margin``, ``lam`` and ``normalization`` are
    those of the official class, ``alpha`` 2 that of its scripts, which run ``margin=0.1,
    lam=10.0`` (chosen among 0.1, 1 and 10).

    Args:
        strength: the share of this loss in [0, 1]; the rest stays the cross-entropy.
        lam: ``lambda_0``, above 0.
        alpha: above 1; large values hold ``lambda_i`` at ``lambda_0``. To change it over the run:
            ``AttributeSchedule(..., paths=["callbacks.ALDRLoss.alpha"])``.
        margin: ``c``, at least 0.
        normalization: of the logits: ``"l1"``, ``"softplus"`` or ``"none"``; see
            :class:`LDRLoss`.
        iterations: updates of ``lambda_i`` in a step, at least 1.
        stored: keep ``lambda_i`` between epochs. Without, a step starts from ``lambda_0`` and
            nothing is remembered: take some ten ``iterations``.
        num_samples: the length of the training set; ``None`` takes it from the dataloader.
        replaces: what of the user's loss goes: ``"cross_entropy"``, ``"term"`` or ``"loss"``.
        signals: where ``logits`` and ``targets`` (and ``sample_index``) are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        MissingSignalError: in the first step, if the dataset is no ``IndexedDataset``.
        RegularizationError: in the first step, if labels are not one per sample.

    Note:
        Needs ``IndexedDataset(train_dataset)``, and neither it nor one label per sample with
        ``stored=False``. Over ranks: global; each step gathers one number per sample, so that
        every rank holds the table of ``lambda`` that one process would have. A mixed sample
        moves the ``lambda`` of the place that it has in the batch. Cost: an exponential per
        logit and another per iteration. The table is part of checkpoints (the official code loses
        it). Logged beside the loss is the mean ``lambda_i``, under ``reg/aldr_loss_lambda``.

        It hurts where classes are many and rare ones hard: they are treated as noise.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ALDRLoss
        >>> trainer = L.Trainer(callbacks=[ALDRLoss(alpha=2.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (_PAPER,)
    needs: ClassVar[tuple[str, ...]] = ("logits", "targets", "sample_index")
    function: ClassVar[Callable[..., Any] | None] = staticmethod(aldr_loss)
    explanation: ClassVar[str] = "replaces the cross-entropy by ALDR-KL, one lambda per sample"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        lam: float = 1.0,
        alpha: float = 2.0,
        margin: float = 1.0,
        normalization: Normalization = "l1",
        iterations: int = 1,
        stored: bool = True,
        num_samples: int | None = None,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        check_range(self, "lam", lam, 0, math.inf, low_open=True, high_open=True, cure=_CURE)
        check_range(self, "alpha", alpha, 1, low_open=True, cure=_CURE)
        if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
            problem = f"`iterations` must be a whole number from 1, got {iterations!r}"
            raise ArgumentError(self, problem, cure="ALDRLoss(iterations=10)")
        _check_scores(self, margin, normalization)
        self.lam = lam
        self.alpha = alpha
        self.margin = margin
        self.normalization = normalization
        self.iterations = iterations
        self.stored = stored
        self.memory = SampleTable(self, num_samples, width=1, fill=lam)

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """ALDR-KL of each row, at the ``lambda`` to which this step moves its sample."""
        scores = _normalized(logits, self.normalization)
        lam = self._lambda(step, scores)
        if not step.is_rerun:
            step.log(self, lam.mean(), "lambda")
        return aldr_loss(scores, distribution, lam, self.lam, self.alpha, self.margin)

    def _lambda(self, step: Step, scores: Tensor) -> Tensor:
        """The ``lambda`` (N,) of each row in this step."""
        if not self.stored:
            return self._moved(scores, scores.new_full((len(scores),), self.lam))
        past = self.recall(step, 1)
        if len(past) != len(scores):
            raise RegularizationError(
                self,
                f"keeps one lambda per sample; the loss has {len(scores)} terms for "
                f"{len(past)} samples",
                cure="ALDRLoss(stored=False, iterations=10)",
            )
        lam = self._moved(scores, past[:, 0].to(scores))
        return self.remembered(step, lam.unsqueeze(-1))[:, 0].to(scores)

    def _moved(self, scores: Tensor, lam: Tensor) -> Tensor:
        return adaptive_lambda(scores, lam, self.lam, self.alpha, self.iterations)

    def state_dict(self) -> dict[str, Any]:
        """The table, if one is kept."""
        return super().state_dict() if self.stored else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved table."""
        if self.stored:
            super().load_state_dict(state_dict)


_CURE = "ALDRLoss(lam=1.0, alpha=2.0)"


def _check_scores(owner: object, margin: float, normalization: str) -> None:
    cure = f"{type(owner).__name__}(margin=1.0)"
    check_range(owner, "margin", margin, 0, math.inf, high_open=True, cure=cure)
    if normalization not in _NORMALIZATIONS:
        raise ArgumentError(
            owner,
            f"`normalization` must be one of {', '.join(_NORMALIZATIONS)}, got {normalization!r}",
            cure=f'{type(owner).__name__}(normalization="none")',
        )
