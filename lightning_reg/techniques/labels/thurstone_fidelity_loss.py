"""Teaches which of two samples scores higher, and how surely, by Thurstone's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.score_levels import (
    Place,
    ScoreRange,
    check_place,
    check_score_range,
    level_scores,
    read_scores,
)

__all__ = ["ThurstoneFidelityLoss", "thurstone_fidelity_loss"]

_EPS = 1e-8


def thurstone_fidelity_loss(
    means: Tensor, stds: Tensor, true_means: Tensor, true_stds: Tensor
) -> Tensor:
    """``1 - sqrt(q qhat) - sqrt((1 - q)(1 - qhat))`` of every pair of samples.

    With ``q = Phi((mu_i - mu_j) / sqrt(sd_i^2 + sd_j^2))``, the probability that sample i scores
    higher than sample j, and ``qhat`` the same of the predictions. 0 where both agree. 1e-8 stands
    under each root.

    Args:
        means: predicted means (N,).
        stds: predicted deviations (N,), at least 0.
        true_means: (N,).
        true_stds: (N,), at least 0.

    Returns:
        (N, N), symmetric; its diagonal is 0 and means nothing.
    """
    return _fidelity(
        _preference(means, stds, means, stds),
        _preference(true_means, true_stds, true_means, true_stds).detach(),
    )


def _preference(mean: Tensor, std: Tensor, others: Tensor, other_stds: Tensor) -> Tensor:
    """The probability (n, N) of the row scoring higher than the column."""
    variance = std.square().unsqueeze(1) + other_stds.square() + _EPS
    surer: Tensor = torch.special.ndtr((mean.unsqueeze(1) - others) / variance.sqrt())
    return surer


def _fidelity(predicted: Tensor, true: Tensor) -> Tensor:
    agree = (predicted * true + _EPS).sqrt()
    return 1 - agree - ((1 - predicted) * (1 - true) + _EPS).sqrt()


def _mean_and_std(logits: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the level (N,) under the softmax of logits (N, C)."""
    p = logits.softmax(-1)
    mean = p @ levels
    variance = (p * (levels - mean.unsqueeze(-1)).square()).sum(-1)
    # The root has no gradient at 0, where one level has all the mass.
    return mean, (variance + _EPS).sqrt()


class ThurstoneFidelityLoss(Regularizer):
    """Teaches which of two samples scores higher, and how surely, by Thurstone's model (DeQA).

    You, Cai, Gu, Xue, Dong (2025), Teaching Large Language Models to Regress Accurate Image
    Quality Scores using Score Distribution, arXiv:2501.11561.

    ``L = mean over pairs of 1 - sqrt(q qhat) - sqrt((1 - q)(1 - qhat))``, where ``q`` is the
    probability that one sample scores higher than the other, for scores that are normal; see
    :func:`thurstone_fidelity_loss`. It sees differences only, so that data sets whose scales of
    scores do not agree can be trained on together, with pairs from within each of them.

    Value and gradient are those of zhiyuanyou/DeQA-Score@8e4abc8 (src/model/modeling_mplug_owl2.py,
    ``rating_loss``), 1e-8 included. Its training script takes a deviation of 1 for predictions
    (``std=1.0``) and that of the data for the truth; the default here is the deviation of the
    predicted distribution, as in the paper. It compares each sample with one partner from the same
    data set; here all pairs of the joint batch count.

    Args:
        strength: the multiplier, at least 0.
        true_mean: where the batch has the mean score of each sample (B,): ``"batch.<key>"``.
        true_std: where it has the deviation, or one number for all.
        score_range: the scores of the first and the last level, (1, C) by default. Logits of one
            column are the score itself.
        std: the deviation of predictions: ``"predicted"``, of the softmax over levels, or a number,
            which one column needs.
        detach_std: whether the loss has no gradient by the predicted deviation.
        groups: whether pairs are of one group only (``domain``: the data set).
        signals: where ``logits`` (B, C), or (B, 1), and ``domain`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if there is no score for each row of logits.

    Note:
        Over ranks: global; scores of all ranks are gathered with gradients, each rank takes the
        pairs of its own samples with all others, and their mean shares the one all-reduce of all
        means. Under accumulation pairs are those of one micro-batch. Cost: a gather of 4 numbers
        a sample and one of its group, and a normal distribution function a pair.

        It does not say what a score is, only which is higher: keep a loss beside it that does, as
        :class:`ScoreDistributionSoftLabel`.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ThurstoneFidelityLoss
        >>> rank = ThurstoneFidelityLoss(true_mean="batch.score", true_std="batch.std", groups=True)
        >>> trainer = L.Trainer(callbacks=[rank], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Teaching Large Language Models to Regress Accurate Image Quality Scores using Score "
            "Distribution",
            "You et al.",
            2025,
            "2501.11561",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    reads: ClassVar[frozenset[str]] = frozenset({"logits"})
    exemptions: ClassVar[dict[str, str]] = {"accumulation": "pairs are those of one micro-batch"}
    function: ClassVar[Callable[..., Any] | None] = staticmethod(thurstone_fidelity_loss)
    explanation: ClassVar[str] = "teaches which of two samples scores higher, and how surely"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        true_mean: Place,
        true_std: Place,
        score_range: ScoreRange = None,
        std: Literal["predicted"] | float = "predicted",
        detach_std: bool = False,
        groups: bool = False,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        cure = 'ThurstoneFidelityLoss(true_mean="batch.score", true_std=0.5)'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_place(self, "true_mean", true_mean)
        check_place(self, "true_std", true_std)
        if std != "predicted":
            check_range(self, "std", std, 0, low_open=True, cure=cure)  # type: ignore[arg-type]
        self.true_mean = true_mean
        self.true_std = true_std
        self.score_range = check_score_range(self, score_range)
        self.std = std
        self.detach_std = detach_std
        self.groups = groups

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        predicted = self._predicted(step.logits)
        like = predicted[0].detach()
        true = (
            read_scores(self, step, self.true_mean, len(like), like),
            read_scores(self, step, self.true_std, len(like), like),
        )
        group = self._group(step, like)
        own = torch.stack([*predicted, *true], 1)
        # The positions tell a sample from its equals; ranks are told apart by how many come first.
        rank = torch.full_like(group, step.comm.rank)
        everyone = step.comm.gather(own)
        marks = step.comm.gather(torch.stack([group, rank], 1))
        mine = marks[:, 1] == step.comm.rank
        same = group.unsqueeze(1) == marks[:, 0]
        pairs = same & ~torch.eye(len(marks), dtype=torch.bool, device=same.device)[mine]
        mean, std, true_mean, true_std = everyone.unbind(1)
        likely = _preference(*predicted, mean, std)
        right = _preference(*true, true_mean, true_std).detach()
        counted = pairs.flatten().to(like)
        return JointMean.of(_fidelity(likely, right).flatten(), counted, fixed=True)

    def _predicted(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        one = logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1)
        if (one and self.std == "predicted") or logits.ndim > 2:
            raise RegularizationError(
                self,
                "needs logits (B, C) over levels for a predicted deviation, got "
                f"{tuple(logits.shape)}",
                cure='ThurstoneFidelityLoss(true_mean="batch.score", true_std=0.5, std=1.0)',
            )
        if one:
            mean, std = logits.reshape(-1), torch.ones_like(logits.reshape(-1))
        else:
            levels = level_scores(self.score_range, logits.shape[1], logits)
            mean, std = _mean_and_std(logits, levels)
        if not isinstance(self.std, str):
            std = torch.full_like(mean, self.std).detach()
        return mean, std.detach() if self.detach_std else std

    def _group(self, step: Step, like: Tensor) -> Tensor:
        if not self.groups:
            return torch.zeros_like(like, dtype=torch.long)
        return torch.as_tensor(step.domain, device=like.device).reshape(-1).long()
