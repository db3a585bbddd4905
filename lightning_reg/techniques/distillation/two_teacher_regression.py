"""Guides a regression by two teachers: one of the targets, one of a smoothed version of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.given_teacher import GivenTeachers

__all__ = [
    "TwoTeacherRegression",
    "assistive_loss",
    "shape_model",
    "soft_landmarks",
    "teacher_bounded_loss",
]


def assistive_loss(
    predictions: Tensor,
    targets: Tensor,
    teacher: Tensor,
    pull: float = 1.9,
    push: float = 0.45,
    near: float = 0.15,
) -> Tensor:
    """A teacher's help towards the target, of each number.

    With the errors ``a = |s - y|`` of the student and ``r = |t - y|`` of the teacher, which is
    reflected to the student's side of the target: ``pull (a - r)`` where the student is the worse
    one, ``-push (r - a)`` where it is better, and 0 where it is better by far (``a < near r``).
    Either way the gradient leads to the target.

    Args:
        predictions: (...) ``s``.
        targets: (...) ``y``.
        teacher: (...) ``t``; no gradient flows.
        pull: the weight of a student that is worse.
        push: of one that is better.
        near: how near to the target it is left alone, as a share of the teacher's error.

    Returns:
        (...).
    """
    own, theirs = (predictions - targets).abs(), (teacher.detach() - targets).abs()
    # A teacher without an error has no side to be on.
    worse = (own > theirs) & (theirs > 0)
    better = (own >= near * theirs) & (own <= theirs)
    weight = pull * worse.to(own) - push * better.to(own)
    return weight * (own - theirs).abs()


def teacher_bounded_loss(predictions: Tensor, targets: Tensor, teacher: Tensor) -> Tensor:
    """``3 a`` while ``a <= r``, and ``a^2 + 3 r - r^2`` beyond: of each number.

    Linear within the error ``r = |t - y|`` of a teacher, quadratic outside: how far off a teacher
    is says which errors are large.

    Args:
        predictions: (...) ``s``; ``a = |s - y|``.
        targets: (...) ``y``.
        teacher: (...) ``t``; no gradient flows.

    Returns:
        (...).
    """
    own, theirs = (predictions - targets).abs(), (teacher.detach() - targets).abs()
    return torch.where(own <= theirs, 3 * own, own.square() + 3 * theirs - theirs.square())


def shape_model(targets: Tensor, share: float = 0.9) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the first principal modes, and their deviations (an active shape model).

    Args:
        targets: (N, D) the targets of a training set, N at least 2.
        share: of the variance that the modes have to explain, in (0, 1].

    Returns:
        (D,) mean, (k, D) orthonormal modes, (k,) standard deviations.
    """
    mean = targets.mean(0)
    _, values, modes = torch.linalg.svd(targets - mean, full_matrices=False)
    variances = values.square() / (len(targets) - 1)
    explained = variances.cumsum(0) / variances.sum()
    count = min(int((explained < share).sum()) + 1, len(variances))
    return mean, modes[:count], variances[:count].sqrt()


def soft_landmarks(
    targets: Tensor, mean: Tensor, modes: Tensor, deviations: Tensor, limit: float = 3.0
) -> Tensor:
    """``m + sum_k clip(<y - m, e_k>, -3 sd_k, 3 sd_k) e_k``: targets that a shape model can say.

    What the tolerant teacher is trained on.

    Args:
        targets: (N, D) ``y``.
        mean: (D,) ``m``, with the others from :func:`shape_model`.
        modes: (k, D) ``e``.
        deviations: (k,) ``sd``.
        limit: how many deviations a mode may be off.
    """
    scores = (targets - mean) @ modes.T
    return mean + scores.clamp(-limit * deviations, limit * deviations) @ modes


class TwoTeacherRegression(GivenTeachers):
    """Leads a small regression network to its targets by the errors of two larger ones (KD-Loss).

    Fard, Mahoor (2022), Facial Landmark Points Detection Using Knowledge Distillation-Based Neural
    Networks, arXiv:2111.07047.

    A tough teacher is trained on the targets (landmarks, or any vector), a tolerant one on targets
    smoothed by a shape model (:func:`shape_model`, :func:`soft_landmarks`), which are easier to
    learn. The student's loss is ``w_m M + w_1 A(tough) + w_2 A(tolerant)``: ``M`` is linear up to
    the tolerant teacher's error and quadratic beyond (:func:`teacher_bounded_loss`); each ``A``
    (:func:`assistive_loss`) adds to the pull towards the target, most where the student is worse
    than that teacher, and stops near the target. The teachers are never targets themselves.

    Confirmed with the official code (aliprf/KD-Loss, custom_Losses.py, student_train.py, main.py),
    in value and gradient: the weights 2, 1, 1, pull and push 1.9 and 0.45 (tough), 1.8 and 0.4
    (tolerant), 0.15. The shape model's clip at three deviations is its pca_utility.py; the share
    of variance, 0.9, is ours. Its constants suit targets in units of the object's size.

    Args:
        strength: ``s`` in [0, 1]: the loss becomes ``(1 - s)`` times the user's plus ``s`` times
            the above.
        tough_teacher: a network of the student's outputs, trained on the targets.
        tolerant_teacher: one that was trained on smoothed targets.
        main_weight: ``w_m``, at least 0.
        tough_weight: ``w_1``, at least 0.
        tolerant_weight: ``w_2``, at least 0.
        tough_pull: of ``A(tough)``, where the student is worse.
        tough_push: where it is better.
        tolerant_pull: of ``A(tolerant)``.
        tolerant_push: likewise.
        near: the share of a teacher's error within which its ``A`` is 0, in [0, 1].
        signals: where ``inputs``, ``logits`` (the outputs) and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: if targets or a teacher's outputs are not of the outputs' shape, or a
            run resumes with another teacher.

    Note:
        Over ranks: global; a mean over all numbers of all ranks' samples. Under accumulation
        nothing changes. Cost: two forward passes of teachers without gradients.

        Where the student is better than a teacher its term is negative. All terms lead to the
        targets, so it hurts where those are few and noisy: there the plain squared error
        generalized better in a small test of ours.

    Example:
        >>> import lightning as L, torch
        >>> from lightning_reg import TwoTeacherRegression
        >>> tough, tolerant = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)  # trained networks
        >>> technique = TwoTeacherRegression(tough_teacher=tough, tolerant_teacher=tolerant)
        >>> trainer = L.Trainer(callbacks=[technique], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Facial Landmark Points Detection Using Knowledge Distillation-Based Neural Networks",
            "Fard & Mahoor",
            2021,
            "2111.07047",
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits", "targets"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(assistive_loss)
    explanation: ClassVar[str] = "leads a regression by the errors of two teachers"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        tough_teacher: nn.Module,
        tolerant_teacher: nn.Module,
        main_weight: float = 2.0,
        tough_weight: float = 1.0,
        tolerant_weight: float = 1.0,
        tough_pull: float = 1.9,
        tough_push: float = 0.45,
        tolerant_pull: float = 1.8,
        tolerant_push: float = 0.4,
        near: float = 0.15,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        teachers = {"tough_teacher": tough_teacher, "tolerant_teacher": tolerant_teacher}
        super().__init__(strength, teachers=teachers, signals=signals, name=name)
        cure = "TwoTeacherRegression(1.0, tough_teacher=one, tolerant_teacher=other, near=0.15)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, 1, cure=cure)
        numbers = {
            "main_weight": main_weight,
            "tough_weight": tough_weight,
            "tolerant_weight": tolerant_weight,
            "tough_pull": tough_pull,
            "tough_push": tough_push,
            "tolerant_pull": tolerant_pull,
            "tolerant_push": tolerant_push,
        }
        for argument, value in numbers.items():
            check_range(self, argument, value, 0, cure=cure)
        check_range(self, "near", near, 0, 1, cure=cure)
        self.main_weight = main_weight
        self.tough_weight = tough_weight
        self.tolerant_weight = tolerant_weight
        self.tough_pull = tough_pull
        self.tough_push = tough_push
        self.tolerant_pull = tolerant_pull
        self.tolerant_push = tolerant_push
        self.near = near

    def scale_loss(self, step: Step) -> float:
        """What the strength leaves of the user's loss."""
        return 1 - step.strength(self)

    def penalty(self, step: Step) -> JointMean:
        """Phase 4."""
        inputs, outputs, targets = step.inputs, step.logits, step.targets
        if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
            kind = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise RegularizationError(
                self,
                f"needs a target for each output {tuple(outputs.shape)}, got {kind}",
                cure='signals=Signals(logits="module.<name>", targets="batch.<key>")',
            )
        targets = targets.to(outputs)
        tough = self.answer("tough_teacher", step, inputs)
        tolerant = self.answer("tolerant_teacher", step, inputs)
        values = self.main_weight * teacher_bounded_loss(outputs, targets, tolerant)
        values = values + self.tough_weight * assistive_loss(
            outputs, targets, tough, self.tough_pull, self.tough_push, self.near
        )
        values = values + self.tolerant_weight * assistive_loss(
            outputs, targets, tolerant, self.tolerant_pull, self.tolerant_push, self.near
        )
        return JointMean.of(values.flatten())
