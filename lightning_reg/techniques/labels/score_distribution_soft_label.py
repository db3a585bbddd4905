"""Replaces the nearest level of a score by the distribution of the score over levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.criterion import labelled, mixed
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.score_levels import (
    Place,
    ScoreRange,
    check_place,
    check_score_range,
    level_scores,
    read_scores,
)
from lightning_reg.mechanisms.target_transform import Replaces, TargetTransform

__all__ = ["ScoreDistributionSoftLabel", "score_distribution_soft_label"]

Density = Literal["cdf", "pdf"]
_DENSITIES = ("cdf", "pdf")


def score_distribution_soft_label(
    mean: Tensor,
    std: Tensor,
    levels: Tensor,
    density: Density = "cdf",
    min_std: float = 0.2,
    max_shift: float = 0.1,
) -> Tensor:
    """The distribution over levels of a score that is normal with this mean and deviation.

    ``r_c = Phi((c + h/2 - mu) / sd) - Phi((c - h/2 - mu) / sd)`` for levels ``c`` with spacing
    ``h``, then ``p_c = a r_c + b`` with ``a`` and ``b`` such that ``sum p = 1`` and ``sum c p =
    mu``, negative ones set to 0, and scaled to a sum of 1. Where ``sd < min_std``, or the cut at 0
    has moved the mean by more than ``max_shift``, the two levels next to ``mu`` share the mass
    instead, with mean ``mu``.

    Args:
        mean: ``mu`` (N,), cut off at the first and last level.
        std: ``sd`` (N,), at least 0, in units of the score.
        levels: (C,), evenly spaced and increasing.
        density: ``"cdf"``: the mass between levels, as above; ``"pdf"``: the density at them.
        min_std: in units of the spacing.
        max_shift: in units of the spacing.

    Returns:
        (N, C), rows summing to 1.
    """
    spacing = levels[1] - levels[0]
    place = ((mean - levels[0]) / spacing).clamp(0, len(levels) - 1).unsqueeze(-1)
    spread = (std / spacing).unsqueeze(-1)
    index = torch.arange(len(levels), dtype=mean.dtype, device=mean.device)
    # A deviation below the least is not used; it must not divide by 0.
    raw = _raw(index - place, spread.clamp_min(max(min_std, 1e-3)), density)
    positive = _with_mean(raw, index, place).clamp_min(0)
    smooth = positive / positive.sum(-1, keepdim=True)
    shift = ((smooth * index).sum(-1, keepdim=True) - place).abs()
    two = (1 - (index - place).abs()).clamp_min(0)
    return torch.where((spread < min_std) | (shift > max_shift), two, smooth)


def _raw(distance: Tensor, std: Tensor, density: Density) -> Tensor:
    if density == "pdf":
        return (-0.5 * (distance / std).square()).exp()
    phi = torch.special.ndtr
    mass: Tensor = phi((distance + 0.5) / std) - phi((distance - 0.5) / std)
    return mass


def _with_mean(raw: Tensor, index: Tensor, place: Tensor) -> Tensor:
    """``a raw + b`` with sum 1 and mean ``place``."""
    middle = (len(index) - 1) / 2
    mass = raw.sum(-1, keepdim=True)
    moment = (raw * (index - middle)).sum(-1, keepdim=True)
    # In the middle both vanish, and any `a` keeps the mean.
    central = moment.abs() < 1e-6
    slope = (place - middle) / torch.where(central, torch.ones_like(moment), moment)
    slope = torch.where(central, 1 / mass, slope)
    return slope * raw + (1 - slope * mass) / len(index)


class ScoreDistributionSoftLabel(TargetTransform):
    """Replaces the nearest level of a score by the distribution of the score over levels (DeQA).

    You, Cai, Gu, Xue, Dong (2025), Teaching Large Language Models to Regress Accurate Image
    Quality Scores using Score Distribution, arXiv:2501.11561.

    A classifier of C levels, whose expected level is the score, is trained on what is known of the
    score of each sample, a mean and a deviation, in place of the level next to the mean: see
    :func:`score_distribution_soft_label`. The mean of the label is the mean of the score, which
    rounding to a level loses.

    Labels are those of zhiyuanyou/DeQA-Score@8e4abc8 (build_soft_labels/gen_soft_label.py): the
    affine correction, its cut at 0, the two thresholds and the two-level labels. That code leaves
    the sum after the cut as it is (up to 1.01), and takes the shift of the mean before scaling,
    which depends on the end of the scale; here rows sum to 1, and it is that of the label. For a
    mean exactly in the middle of the scale it divides 0 by 0, and makes the label uniform; here it
    is the plain distribution. It takes ``"pdf"`` for data with large deviations.

    Args:
        strength: how far one goes from the label of your step to this one, in [0, 1]; 0 turns the
            technique off.
        mean: where the batch has the mean score of each sample (B,): ``"batch.<key>"``.
        std: where it has the deviation, at least 0, or one number for all.
        score_range: the scores of the first and the last level, (1, C) by default.
        density: ``"cdf"`` or ``"pdf"``.
        min_std: in units of the spacing of levels; below it two levels share the label.
        max_shift: of the mean by the cut, in units of the spacing.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy with the level next to the
            score, ``"term"`` if that is one of its terms, ``"loss"`` to drop whatever it is.
        signals: where ``logits`` (B, C) and ``targets``, the levels as class indices, are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if the batch has no mean and deviation for each
            label.

    Note:
        Over ranks: global, since the loss is a mean of per-sample losses. No collective. Cost: C
        normal distribution functions a sample. It hurts with deviations that are wrong: large
        ones flatten the label.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ScoreDistributionSoftLabel
        >>> soft = ScoreDistributionSoftLabel(mean="batch.score", std=0.5)
        >>> trainer = L.Trainer(callbacks=[soft], logger=False)
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
    exclusive: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(score_distribution_soft_label)
    explanation: ClassVar[str] = (
        "your labels stay in the batch; the loss is the cross-entropy of the captured logits with "
        "the distribution of each score over levels"
    )

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        mean: Place,
        std: Place,
        score_range: ScoreRange = None,
        density: Density = "cdf",
        min_std: float = 0.2,
        max_shift: float = 0.1,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        cure = 'ScoreDistributionSoftLabel(mean="batch.score", std=0.5, score_range=(1, 5))'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, 1, cure=cure)
        check_place(self, "mean", mean)
        check_place(self, "std", std)
        if density not in _DENSITIES:
            problem = f"`density` must be one of {', '.join(_DENSITIES)}, got {density!r}"
            raise ArgumentError(self, problem, cure=cure)
        check_range(self, "min_std", min_std, 0, cure=cure)
        check_range(self, "max_shift", max_shift, 0, cure=cure)
        self.mean = mean
        self.std = std
        self.score_range = check_score_range(self, score_range)
        self.density: Density = density
        self.min_std = min_std
        self.max_shift = max_shift

    def new_targets(self, distribution: Tensor, strength: float, step: Step) -> Tensor:
        """The distributions of the scores, mixed as the batch is."""
        targets, classes = step.targets, distribution.shape[-1]
        mean, std = (
            labelled(read_scores(self, step, place, len(targets), distribution), targets, classes)
            for place in (self.mean, self.std)
        )
        if len(mean) != len(distribution):
            raise RegularizationError(
                self,
                f"needs one label for each sample, got targets {tuple(targets.shape)}",
                cure=f"remove {type(self).__name__}",
            )
        levels = level_scores(self.score_range, classes, distribution)
        soft = score_distribution_soft_label(
            mean, std, levels, self.density, self.min_std, self.max_shift
        )
        return torch.lerp(distribution, mixed(step, soft), strength)
