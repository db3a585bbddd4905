"""Gives samples that are predicted well already a smaller weight in the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals, Step
from lightning_reg.engine.criterion import as_distribution
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces

__all__ = ["FocalLoss", "focal_loss"]

FocalTask = Literal["multiclass", "multilabel"]
_TASKS = ("multiclass", "multilabel")


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    *,
    gamma_below: Mapping[float, float] | None = None,
    alpha: float | Sequence[float] | Tensor | None = None,
    task: FocalTask = "multiclass",
) -> Tensor:
    """``-alpha_c (1 - p_c)^gamma log p_c``, summed over the classes of each label.

    Soft, smoothed and mixed labels weight the terms of their classes:
    ``sum_c q_c alpha_c (1 - p_c)^gamma (-log p_c)``. ``gamma = 0`` is the cross-entropy.

    Args:
        logits: (N, C).
        targets: (N,) class indices, or (N, C) distributions; for ``"multilabel"`` (N, C) in [0, 1].
        gamma: the exponent, at least 0.
        gamma_below: other exponents where ``p`` is below a threshold: ``{0.2: 5.0}``. The smallest
            threshold above ``p`` counts. The choice has no gradient.
        alpha: a weight per class (C,). For ``"multilabel"`` the weight of positives, negatives
            having ``1 - alpha``: a number, or one per class.
        task: ``"multiclass"``: the softmax; ``"multilabel"``: a sigmoid per class, whose two terms
            ``q`` and ``1 - q`` weight, averaged over classes.

    Returns:
        (N,), at least 0, in nats.
    """
    if task == "multiclass":
        log_p = F.log_softmax(logits, dim=-1)
        distribution = as_distribution(targets, logits)
        losses = _terms(log_p, distribution, gamma, gamma_below)
        if alpha is not None:
            losses = losses * torch.as_tensor(alpha, dtype=losses.dtype, device=losses.device)
        return losses.sum(-1)
    positive = _terms(F.logsigmoid(logits), targets.to(logits), gamma, gamma_below)
    negative = _terms(F.logsigmoid(-logits), 1 - targets.to(logits), gamma, gamma_below)
    if alpha is None:
        return (positive + negative).mean(-1)
    weight = torch.as_tensor(alpha, dtype=logits.dtype, device=logits.device)
    return (weight * positive + (1 - weight) * negative).mean(-1)


def _terms(
    log_p: Tensor, share: Tensor, gamma: float, gamma_below: Mapping[float, float] | None
) -> Tensor:
    """``q (1 - p)^gamma (-log p)``; a class without a share costs nothing, whatever its ``p``."""
    log_p = log_p.masked_fill(share == 0, 0.0)
    # Below this 1 - p is rounding, and a power under 1 would have an infinite gradient there.
    rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).eps)
    return -share * rest.pow(_exponents(log_p, gamma, gamma_below)) * log_p


def _exponents(
    log_p: Tensor, gamma: float, gamma_below: Mapping[float, float] | None
) -> Tensor | float:
    if not gamma_below:
        return gamma
    p = log_p.detach().exp()
    exponents = torch.full_like(p, gamma)
    for threshold, other in sorted(gamma_below.items(), reverse=True):
        exponents = torch.where(p < threshold, other, exponents)
    return exponents


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


class FocalLoss(LossReplacement):
    """Gives samples that are predicted well already a smaller weight in the loss.

    Lin, Goyal, Girshick, He, Dollar (2017), Focal Loss for Dense Object Detection,
    arXiv:1708.02002; as a means of calibration, and with exponents that follow the sample: Mukhoti,
    Kulharia, Sanyal, Golodetz, Torr, Dokania (2020), Calibrating Deep Neural Networks using Focal
    Loss, arXiv:2002.09437.

    ``FL = -alpha_y (1 - p_y)^gamma log p_y``, in nats. Against rare positives ``gamma = 2`` with
    ``alpha = 0.25`` is the first paper's choice for sigmoid outputs (``task="multilabel"``). For
    calibration the second paper's FLSD-53 is ``FocalLoss(gamma=3.0, gamma_below={0.2: 5.0})``: 5
    where the label has a probability below 0.2, and 3 elsewhere. The gradient is ``g(p, gamma) =
    (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p`` times that of the cross-entropy: below 1 for
    surer samples, so that weights stop to grow, and confidences with them; the exponents make it
    so from a probability on that they were solved for. Confirmed against its released code
    (torrvision/focal_calibration, Losses/focal_loss.py and focal_loss_adaptive_gamma.py), which
    sums over the batch; here it is the mean.

    Labels that are smoothed or mixed by other techniques weight the terms of their classes.
    ``gamma`` is an attribute: :class:`AttributeSchedule` can move it over the run.

    Args:
        strength: the share of the new loss, in [0, 1]; the rest stays the cross-entropy.
        gamma: the exponent, at least 0; 0 is the cross-entropy.
        gamma_below: other exponents below probabilities of the label, ``{0.2: 5.0}``.
        alpha: a weight per class, as a list; for ``"multilabel"`` the weight of positives in
            [0, 1], as a number or a list. The mean is not divided by the weights' sum.
        task: ``"multiclass"``; or ``"multilabel"``: float labels of the logits' shape, averaged
            over classes. Its cross-entropy is another one, so that it needs ``replaces="loss"``.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy, ``"term"`` if that is one
            of its terms, ``"loss"`` to drop whatever it is.
        signals: where ``logits`` and ``targets`` are. A binary output of one column (B, 1), with
            integer labels (B,), is the two-class one of logits (0, z):
            ``Signals(logits=lambda step: F.pad(step.outputs["logits"], (1, 0)))``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if ``alpha`` has not one weight per class.

    Note:
        Over ranks: global; a mean over samples, for which nothing is communicated. Positions with
        a label that is no class do not count. Cost: a log-softmax and a power over the logits.

        It hurts the accuracy with a large ``gamma`` (5 and more) from the start, and on noisy
        labels, whose samples keep the largest weight. Predictions become less sure: with much
        other regularization they end underconfident.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import FocalLoss
        >>> trainer = L.Trainer(callbacks=[FocalLoss(gamma=3.0, gamma_below={0.2: 5.0})])
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Focal Loss for Dense Object Detection", "Lin et al.", 2017, "1708.02002"),
        Paper(
            "Calibrating Deep Neural Networks using Focal Loss",
            "Mukhoti et al.",
            2020,
            "2002.09437",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(focal_loss)
    explanation: ClassVar[str] = "weights each sample's loss by how badly it is predicted"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        gamma: float = 2.0,
        gamma_below: Mapping[float, float] | None = None,
        alpha: float | Sequence[float] | None = None,
        task: FocalTask = "multiclass",
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        check_range(self, "gamma", gamma, 0, cure="FocalLoss(gamma=2.0)")
        gamma_below = self._thresholds(gamma_below)
        self._check_task(task, replaces, strength)
        self._check_alpha(alpha, task)
        self.gamma = gamma
        self.gamma_below = gamma_below
        self.alpha = alpha
        self.task: FocalTask = task

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss of each row."""
        if isinstance(self.alpha, Sequence) and len(self.alpha) != logits.shape[-1]:
            raise ArgumentError(
                self,
                f"`alpha` has {len(self.alpha)} weights for {logits.shape[-1]} classes",
                cure=f"FocalLoss(alpha=[1.0] * {logits.shape[-1]})",
            )
        return focal_loss(
            logits,
            distribution,
            self.gamma,
            gamma_below=self.gamma_below,
            alpha=self.alpha,
            task=self.task,
        )

    def _thresholds(self, gamma_below: Mapping[float, float] | None) -> dict[float, float] | None:
        if gamma_below is None:
            return None
        cure = "FocalLoss(gamma=3.0, gamma_below={0.2: 5.0})"
        if not isinstance(gamma_below, Mapping):
            raise ArgumentError(
                self, f"`gamma_below` must be a dict, got {gamma_below!r}", cure=cure
            )
        # A command line gives its keys as text.
        found = {_number(threshold): gamma for threshold, gamma in gamma_below.items()}
        for threshold, gamma in found.items():
            check_range(self, "gamma_below", threshold, 0, 1, cure=cure)
            check_range(self, "gamma_below", gamma, 0, cure=cure)
        return found

    def _check_task(self, task: str, replaces: str, strength: float | Schedule) -> None:
        if task not in _TASKS:
            raise ArgumentError(
                self,
                f"`task` must be one of {', '.join(_TASKS)}, got {task!r}",
                cure='FocalLoss(task="multiclass")',
            )
        if task == "multilabel" and (replaces != "loss" or strength not in (0, 1)):
            raise ArgumentError(
                self,
                'with task="multilabel" replaces your loss as a whole, which is no cross-entropy '
                f"over classes; got replaces={replaces!r} and strength={strength!r}",
                cure='FocalLoss(task="multilabel", replaces="loss")',
            )

    def _check_alpha(self, alpha: object, task: str) -> None:
        if alpha is None:
            return
        cure = f"FocalLoss(alpha={'0.25' if task == 'multilabel' else '[0.25, 0.75]'})"
        listed = isinstance(alpha, Sequence) and not isinstance(alpha, str)
        if task == "multiclass" and not listed:
            raise ArgumentError(
                self, f"`alpha` must be a list, one weight per class, got {alpha!r}", cure=cure
            )
        highest = 1 if task == "multilabel" else None
        for weight in alpha if isinstance(alpha, Sequence) and listed else [alpha]:
            check_range(self, "alpha", weight, 0, highest, cure=cure)  # type: ignore[arg-type]
