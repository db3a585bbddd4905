"""Trains experts whose weights change evenly from epoch to epoch, for students to follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, ParameterUpdate, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.critic_penalty import length_penalty
from lightning_reg.mechanisms.gradient_penalty import GradientPenalty, input_gradient

__all__ = ["SmoothExpertTrajectory", "smooth_expert_penalty", "trajectory_matching"]

Weights = Sequence[Tensor]
_CLIP = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def smooth_expert_penalty(outputs: Tensor, points: Tensor, center: float = 1.0) -> Tensor:
    """``(||d(sum_c y_c)/dx||_2 - k)^2``, the norm over dimension 1, the mean over all others.

    Args:
        outputs: ``y``, (B, C), a differentiable function of the points.
        points: ``x``, (B, d) or images (B, channels, H, W), whose norm is that of a pixel.
        center: ``k``.

    Returns:
        (B,), at least 0, with a graph.
    """
    gradient = input_gradient(outputs, points)
    places = gradient.flatten(2).transpose(1, 2) if gradient.ndim > 2 else gradient[:, None]
    penalties = length_penalty(places.flatten(0, 1), center, False)
    return penalties.view(places.shape[:2]).mean(1)


def trajectory_matching(
    students: Sequence[Weights], start: Weights, targets: Sequence[Weights], growing: bool = False
) -> Tensor:
    r"""How far a student that starts from an expert's weights ends from where the expert went.

    .. math:: \sum_k \beta_k\, \frac{\lVert \hat\theta_k - \theta^*_k \rVert^2}
        {\lVert \theta^*_0 - \theta^*_k \rVert^2}

    Each term is 1 for a student that has not moved, and 0 for one that is where the expert was.

    Args:
        students: the student's weights :math:`\hat\theta_k` at one or several moments, with a
            graph to what it was trained on; the last is the end.
        start: the expert's weights :math:`\theta^*_0`, from which the student started.
        targets: the expert's weights :math:`\theta^*_k` at the same moments.
        growing: :math:`\beta_k = k / K` for the k-th of K moments; all are 1 otherwise.

    Returns:
        A scalar, at least 0.
    """
    if len(students) != len(targets) or not students:
        raise ArgumentError(
            "trajectory_matching",
            f"needs a student for each target, got {len(students)} and {len(targets)}",
            cure="trajectory_matching([student], start, [target])",
        )
    terms = [
        _squared_distance(now, target) / _squared_distance(start, target)
        for now, target in zip(students, targets, strict=True)
    ]
    count = len(terms)
    return torch.stack([t * ((k + 1) / count if growing else 1) for k, t in enumerate(terms)]).sum()


def _squared_distance(one: Weights, other: Weights) -> Tensor:
    gaps = [(a - b).square().sum() for a, b in zip(one, other, strict=True)]
    return torch.stack(gaps).sum()


class SmoothExpertTrajectory(GradientPenalty):
    """Keeps the weights of an expert from changing fast, so that students can follow its path.

    Shen, Yang, Lam (2023), Efficient Dataset Distillation through Alignment with Smooth and
    High-Quality Expert Trajectories.

    Data sets are distilled by matching the weights of a student on synthetic samples to those of
    an expert on real ones, epoch by epoch. Good experts learn fast at first, in steps that no
    student can make. Two remedies:

    - loss clipping: the loss is multiplied by ``clip[e]`` in epoch ``e``, 1/2 at first and 1 from
      the eleventh epoch on;
    - a gradient penalty, ``strength * mean_i (||d(sum_c y_c)/dx_i|| - k)^2``; see
      :func:`smooth_expert_penalty`.

    The path is recorded with ``record=True``: ``trajectory`` then holds the weights from the
    start and from the end of each epoch, or their moving average with ``average``. The students'
    loss is :func:`trajectory_matching`.

    As in shenjiyuan123/AST-Alignment-with-Smooth-Expert@8030869 (``utils.py``, ``buffer.py``,
    ``distill.py``; read, not run), from which all defaults are: strength 2, ``k = 1``, the ten
    factors, norms over dimension 1, and the weights of intermediate moments. It takes the penalty
    at inputs without augmentation, in a second forward pass; here at those that the network saw.
    The moving average is ours, and off by default.

    Args:
        strength: the multiplier of the gradient penalty, at least 0; 0 turns clipping off too.
        clip: the factors of the loss in the first epochs, above 0; ``()`` clips nothing.
        center: ``k``, at least 0.
        record: keep the weights of every epoch, on the CPU.
        average: the share that a moving average of the recorded weights keeps from step to step,
            in [0, 1); ``None`` records the weights themselves.
        layer: take this submodule's output for the points ``x`` (token embeddings).
        signals: where ``inputs`` and ``logits`` are.
        name: the name in logs and checkpoints.

    Attributes:
        trajectory: one dict of weights by name for the start and for the end of each epoch.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: in the first step, if inputs are integers or the network is compiled.

    Note:
        Over ranks: global; a mean over samples. Under accumulation nothing changes. Cost: a
        gradient by the inputs and a backward through it, about twice the time of a step; recorded
        weights are kept on every rank and in checkpoints, one copy of the network an epoch.

        It hurts where the best expert is wanted for itself: it learns more slowly.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SmoothExpertTrajectory
        >>> trainer = L.Trainer(callbacks=[SmoothExpertTrajectory(record=True)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert "
            "Trajectories",
            "Shen et al.",
            2023,
            None,
        ),
    )
    sharded: ClassVar[bool | None] = False
    function: ClassVar[Callable[..., Any] | None] = staticmethod(smooth_expert_penalty)
    explanation: ClassVar[str] = "scales the first epochs' loss and penalizes input gradients"

    def __init__(
        self,
        strength: float | Schedule = 2.0,
        *,
        clip: Sequence[float] = _CLIP,
        center: float = 1.0,
        record: bool = False,
        average: float | None = None,
        layer: str | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, layer=layer, signals=signals, name=name)
        cure = "SmoothExpertTrajectory(2.0, clip=[0.5, 0.75], record=True)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        if isinstance(clip, str) or not isinstance(clip, Sequence):
            raise ArgumentError(self, f"`clip` must be factors, got {clip!r}", cure=cure)
        for factor in clip:
            check_range(self, "clip", factor, 0, low_open=True, cure=cure)
        check_range(self, "center", center, 0, cure=cure)
        if average is not None:
            check_range(self, "average", average, 0, 1, high_open=True, cure=cure)
        self.clip, self.center = tuple(clip), center
        self.record, self.average = record, average
        self.trajectory: list[dict[str, Tensor]] = []
        self._mean: dict[str, Tensor] = {}

    def acts_in(self, phase: str) -> bool:
        """Without factors the loss is left alone; without an average no step is looked at."""
        if phase == "scale_loss":
            return bool(self.clip)
        return phase != "project" or (self.record and self.average is not None)

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that starts from step 0 begins a new path."""
        super().on_reference(trainer, pl_module)
        if int(trainer.global_step) == 0 and self.record:
            now = _learning(pl_module)
            self._mean = {n: w.detach().clone() for n, w in now.items()} if self.average else {}
            self.trajectory = [_copy(now)]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.record:
            self.trajectory.append(_copy(self._mean or _learning(pl_module)))

    def scale_loss(self, step: Step) -> float:
        """Phase 3: clip the loss."""
        return self.clip[step.epoch] if step.epoch < len(self.clip) else 1.0

    def values(self, outputs: Tensor, points: Tensor, generator: torch.Generator | None) -> Tensor:
        """The gradient penalty of each sample."""
        return smooth_expert_penalty(outputs, points, self.center)

    def project(self, update: ParameterUpdate) -> None:
        """Phase 8: move the average."""
        assert self.average is not None
        now = _learning(update.module)
        names = [name for name in self._mean if name in now]
        mean = [self._mean[name].to(now[name].device) for name in names]
        # A number that is not finite leaves the average where it is.
        fresh = [
            w.where(w.isfinite(), m)
            for w, m in zip((now[name].detach() for name in names), mean, strict=True)
        ]
        torch._foreach_lerp_(mean, fresh, 1 - self.average)
        self._mean.update(zip(names, mean, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The path, and where the average is."""
        return {
            **super().state_dict(),
            "trajectory": [dict(weights) for weights in self.trajectory],
            "mean": _copy(self._mean),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved path."""
        super().load_state_dict(state_dict)
        self.trajectory = [dict(weights) for weights in state_dict["trajectory"]]
        self._mean = dict(state_dict["mean"])


def _learning(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}
