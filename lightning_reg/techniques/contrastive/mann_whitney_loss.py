"""Ranks every positive above every negative: a smooth form of the area under the ROC curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.class_scores import ClassScores, Task
from lightning_reg.mechanisms.embedding_loss import DEFAULT_VIEWS, EmbeddingLoss

__all__ = ["MannWhitneyContrastive", "MannWhitneyLoss", "mann_whitney_loss"]

_PAIRS_AT_ONCE = 1 << 22
_PAPER = Paper(
    "Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval",
    "Sheikholeslami et al.",
    2025,
    "2510.00137",
)


def mann_whitney_loss(positives: Tensor, negatives: Tensor, temperature: float = 1.0) -> Tensor:
    """``mean_ij softplus(-(s_i - s_j) / t)`` over all pairs of a positive i and a negative j.

    ``1[s_i <= s_j] <= softplus(-(s_i - s_j) / t) / log 2``: divided by ``log 2`` it bounds one
    minus the area under the ROC curve from above. Pairs are gone through in blocks: memory is
    O(P + N), in backward too. It can be differentiated once.

    Args:
        positives: (P,) scores.
        negatives: (N,) scores.
        temperature: ``t``, above 0.

    Returns:
        A scalar, at least 0, in nats; 0 without a pair.
    """
    ones = torch.ones_like(positives), torch.ones_like(negatives)
    total = _pairs(positives, negatives, *ones, temperature)
    return total / max(1, positives.numel() * negatives.numel())


def _pairs(
    positives: Tensor, negatives: Tensor, more: Tensor, less: Tensor, temperature: float
) -> Tensor:
    """``sum_ij v_i w_j softplus((s_j - s_i) / t)`` with the weights ``v`` and ``w``."""
    total: Tensor = _PairSum.apply(positives, negatives, more, less, temperature)  # type: ignore[no-untyped-call]
    return total


class _PairSum(torch.autograd.Function):
    """The sum over pairs; the gradients by the scores are summed up on the way, block by block."""

    @staticmethod
    def forward(
        ctx: Any, positives: Tensor, negatives: Tensor, more: Tensor, less: Tensor, t: float
    ) -> Tensor:
        total = positives.new_zeros(())
        up, down = torch.zeros_like(positives), torch.zeros_like(negatives)
        block = max(1, _PAIRS_AT_ONCE // max(1, negatives.numel()))
        for start in range(0, positives.numel(), block):
            rows = slice(start, start + block)
            margin = (negatives - positives[rows].unsqueeze(1)) / t
            weight = more[rows].unsqueeze(1) * less
            total += (weight * F.softplus(margin)).sum()
            slope = weight * torch.sigmoid(margin)
            up[rows] = -slope.sum(1) / t
            down += slope.sum(0) / t
        ctx.save_for_backward(up, down)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        up, down = ctx.saved_tensors
        return grad * up, grad * down, None, None, None


class MannWhitneyLoss(ClassScores):
    """Ranks every positive of the batch above every negative, by their scores.

    Sheikholeslami, Hosseini, Bechard, Daruru, Rajeswar (2025), Optimizing What Matters: AUC-Driven
    Learning for Robust Neural Retrieval, arXiv:2510.00137.

    ``L = mean over all pairs of softplus(-(s_i - s_j) / t)``, for positives i and negatives j of
    the whole batch: the cross-entropy of which of the two is the positive. ``L / log 2`` bounds
    ``1 - AUC`` from above. For class c the score is the log odds ``log p_c / (1 - p_c)``, which for
    one output is the output itself; losses of classes are averaged. It knows no threshold, and
    nothing of how rare the positives are. For embeddings of two views see
    :class:`MannWhitneyContrastive`.

    The formula is from the paper's abstract; not checked against code. ``t = 1`` is ours.

    Args:
        strength: the multiplier, at least 0.
        temperature: ``t``, above 0, in units of the score.
        task: ``"multiclass"``: log odds of a softmax; ``"multilabel"``: of a sigmoid for each
            class, also for one, with labels 0 and 1.
        classes: the classes that are averaged; ``[1]`` is the positive class of two.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if logits and labels do not fit the task.

    Note:
        Over ranks: global; scores and labels of all ranks are gathered with gradients, and each
        rank goes through the pairs of its own positives, whose sum over ranks is divided by the
        number of pairs of all. A soft label is a positive with its weight and a negative with the
        rest. Under accumulation pairs are those of one micro-batch. Cost: P x N terms, in blocks,
        so that memory does not grow with the pairs.

        A batch without positives, or without negatives, counts 0. With a label per pixel there are
        too many pairs: it is for labels of samples. Techniques that differentiate
        the whole loss twice do not go with it. It hurts calibration: adding a
        constant to all scores changes nothing, so keep a loss beside it that does see it.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MannWhitneyLoss
        >>> trainer = L.Trainer(callbacks=[MannWhitneyLoss(classes=[1])], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (_PAPER,)
    exemptions: ClassVar[dict[str, str]] = {"accumulation": "pairs are those of one micro-batch"}
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mann_whitney_loss)
    explanation: ClassVar[str] = "ranks every positive of the batch above every negative"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        temperature: float = 1.0,
        task: Task = "multiclass",
        classes: Sequence[int] | None = None,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            task=task,
            classes=classes,
            ignore_index=ignore_index,
            class_dim=class_dim,
            signals=signals,
            name=name,
        )
        cure = "MannWhitneyLoss(temperature=1.0)"
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        self.temperature = temperature

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        scores, labels, kept = self.positions(step)
        scores = scores if self.task == "multilabel" else _log_odds(scores)
        scores, labels, kept = (self.chosen(t).flatten(0, 1) for t in (scores, labels, kept))
        own = torch.stack([scores, labels * kept, (1 - labels) * kept], 1)
        rows = step.comm.gather(own)
        counts = rows[:, 1].sum(0) * rows[:, 2].sum(0)
        pairs = zip(own.unbind(-1), rows.unbind(-1), strict=True)
        sums = [_sum_of(mine, everyone, self.temperature) for mine, everyone in pairs]
        present = counts > 0
        means = torch.stack(sums) / counts.where(present, torch.ones_like(counts))
        # This rank's share of the joint mean, of which there is one share a rank.
        value = (means * present).sum() / present.sum().clamp_min(1)
        return JointMean(value, torch.full_like(value, 1 / step.comm.world_size).detach())


def _log_odds(logits: Tensor) -> Tensor:
    """``log p_c / (1 - p_c)`` of a softmax over the last dimension."""
    log_p = F.log_softmax(logits, dim=-1)
    # log(1 - p), exact where p is near 0 and where it is near 1.
    tiny = torch.finfo(log_p.dtype).tiny
    return log_p - (-torch.expm1(log_p)).clamp_min(tiny).log()


def _sum_of(own: Tensor, everyone: Tensor, temperature: float) -> Tensor:
    """The weighted sum over this rank's positives and all ranks' negatives; (N, 3) rows each."""
    mine, others = own[own[:, 1] > 0], everyone[everyone[:, 2] > 0]
    weights = mine[:, 1].detach(), others[:, 2].detach()
    return _pairs(mine[:, 0], others[:, 0], *weights, temperature)


class MannWhitneyContrastive(EmbeddingLoss):
    """Ranks every pair of views of one sample above every pair of two samples.

    Sheikholeslami, Hosseini, Bechard, Daruru, Rajeswar (2025), Optimizing What Matters: AUC-Driven
    Learning for Robust Neural Retrieval, arXiv:2510.00137.

    With the similarities ``S = z1 z2^T`` of unit vectors, positives on the diagonal, negatives
    elsewhere: ``L = mean over all pairs of softplus(-(S_ii - S_jk) / t)``. InfoNCE compares a
    query's positive with that query's negatives only, so that a constant added to all
    similarities of one query changes nothing, and scores of different queries cannot be compared
    with one threshold. Here every positive is compared with the negatives of all queries.

    The formula is from the paper's abstract; not checked against code. ``t = 0.1`` is ours.

    Args:
        strength: the multiplier.
        temperature: ``t``, above 0.
        normalize: whether to take cosines, or products of the vectors as they are.
        views: where the two embeddings (queries and documents) are; see :class:`EmbeddingLoss`. By
            default the keys ``z1`` and ``z2`` of the dict that ``training_step`` returns.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``temperature`` is not above 0, or ``views`` names no place.
        RegularizationError: in the first step, if the views differ in shape or are not (B, d).

    Note:
        Over ranks: global; both views are gathered with gradients first. Under accumulation
        negatives come from the micro-batch alone. Cost: one product (N, d) by (d, N) and N^2 (N -
        1) pairs, in blocks that need no memory of their own, on every rank: a batch of 1000 is a
        billion terms.

        As the only loss, let ``training_step`` return a zero of the network. It hurts where a
        batch holds several samples that belong together.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MannWhitneyContrastive
        >>> trainer = L.Trainer(callbacks=[MannWhitneyContrastive(views="head")], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (_PAPER,)
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "negatives come from the micro-batch alone"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mann_whitney_loss)
    explanation: ClassVar[str] = "ranks views of one sample above those of two, over all ranks"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        temperature: float = 0.1,
        normalize: bool = True,
        views: str | Sequence[str] = DEFAULT_VIEWS,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, views=views, name=name)
        cure = "MannWhitneyContrastive(temperature=0.1)"
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        self.temperature = temperature
        self.normalize = normalize

    def value(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of all samples."""
        if self.normalize:
            z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        scores = z1 @ z2.T
        same = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        return mann_whitney_loss(scores[same], scores[~same], self.temperature)
