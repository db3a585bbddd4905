"""Single-step adversarial training that calms the examples which its attack made easier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import Paper, RegularizationError, Schedule, Signals, Step
from lightning_reg.engine.criterion import as_distribution, flatten, soft_cross_entropy
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.adversarial_inputs import AdversarialInputs, Norm

__all__ = ["AAER", "aaer"]


def aaer(
    start_logits: Tensor,
    adversarial_logits: Tensor,
    targets: Tensor,
    loss_weight: float = 2.5,
    logit_weight: float = 1.5,
    loss_gradient: bool = False,
) -> Tensor:
    """``(n/m) (w_L mean_A(l_i^start - l_i^adv) + w_Z max(v_A - sg(v_N), 0))``.

    ``A`` are the ``n`` of ``m`` examples whose cross-entropy ``l`` the attack lowered, ``N`` the
    others, and ``v`` is the mean over a group of ``||z_i^start - z_i^adv||^2``, summed over
    classes. 0 where one of the groups is empty.

    Args:
        start_logits: (B, C) where the attack started; taken as a constant.
        adversarial_logits: (B, C) where it ended.
        targets: (B,) classes, or (B, C) distributions.
        loss_weight: ``w_L``.
        logit_weight: ``w_Z``.
        loss_gradient: whether the gradient passes through ``l^adv`` in the first term.

    Returns:
        A scalar, at least 0.
    """
    sums = _sums(start_logits, adversarial_logits, targets, loss_gradient)
    return _penalty(sums, loss_weight, logit_weight)


class AAER(AdversarialInputs):
    """Single-step adversarial training without catastrophic overfitting, by abnormal examples.

    Lin, Yu, Liu (2023), Eliminating Catastrophic Overfitting Via Abnormal Adversarial Examples
    Regularization, arXiv:2404.08154.

    Brings the attack with it: the loss is that of :class:`AdversarialTraining` at ``x + d``, plus
    ``lambda_1 (n/m) (lambda_2 mean_A(l(x + eta) - l(x + d)) + lambda_3 max(v_A - v_N, 0))``. An
    example is abnormal (``A``) if the attack, from its start ``eta`` to its end ``d``, lowered
    its loss; ``n/m`` is their share, ``v`` the mean of ``||z(x + eta) - z(x + d)||^2`` over
    abnormal and normal (``N``) ones. Their number rises when the network starts to bend the loss
    surface to defeat its own attack, and ``reg/aaer_abnormal_share`` warns of it.

    Confirmed against tmllab/2023_NeurIPS_AAER (``CIFAR10/AAER.py``), whose value and gradient
    are in the tests. There, as by default here, the logits at the start, ``v_N`` and both losses
    of the ``lambda_2`` term are constants, so that only ``z(x + d)`` of abnormal examples carries
    a gradient and ``lambda_2`` changes the value alone; ``loss_gradient=True`` lets it pass
    through ``l(x + d)``, as the paper's formula reads. Nothing is added where all examples are
    normal, or all abnormal.

    Defaults are the repository's for CIFAR-10 at 8/255 with the random start of RS-FGSM; for
    16/255 it uses ``loss_weight=7.0, logit_weight=3.25``, for N-FGSM at 8/255
    ``random_start=2.0, project=False, loss_weight=1.5, logit_weight=0.15``.

    Args:
        strength: ``lambda_1``, at least 0; at 0 plain single-step training is left.
        epsilon: the radius, in the inputs' own unit; 0 turns the attack off too.
        loss_weight: ``lambda_2``.
        logit_weight: ``lambda_3``.
        loss_gradient: whether the first term has a gradient.
        step_size: of the attack; ``None`` takes ``1.25 epsilon`` with a random start.
        norm: ``"linf"`` or ``"l2"``.
        random_start: the radius of the uniform random start, in units of ``epsilon``.
        project: bring steps back into the ball.
        bounds: the least and the largest valid input.
        signals: where ``inputs``, ``targets`` and ``logits`` are.
        name: the name in logs and random streams.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if logits are not (B, C).
        UnsupportedError: if inputs are integers, under manual optimization, and where weights are
            sharded over ranks.

    Note:
        Over ranks: global; shares and means are those of the joint batch, by one all-reduce of
        five numbers; each rank draws its own random starts. Under accumulation they are those of
        a micro-batch. Cost: that of single-step training (one forward and one backward pass
        more); the penalty reads logits that are there anyway.

        It keeps what single-step training has; where that does not overfit it does nothing. With
        few samples per batch the share of abnormal ones is noisy.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AAER
        >>> trainer = L.Trainer(callbacks=[AAER(epsilon=8 / 255)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Eliminating Catastrophic Overfitting Via Abnormal Adversarial Examples Regularization",
            "Lin et al.",
            2023,
            "2404.08154",
        ),
    )
    needs: ClassVar[tuple[str, ...]] = ("inputs", "logits", "targets")
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits", "targets"})
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "the share of abnormal examples and their means are those of a micro-batch"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(aaer)
    explanation: ClassVar[str] = "trains at inputs + d, and calms the examples that d made easier"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        epsilon: float = 8 / 255,
        loss_weight: float = 2.5,
        logit_weight: float = 1.5,
        loss_gradient: bool = False,
        step_size: float | None = None,
        norm: Norm = "linf",
        random_start: float = 1.0,
        project: bool = True,
        bounds: Sequence[float] | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            epsilon=epsilon,
            step_size=step_size,
            norm=norm,
            random_start=random_start,
            project=project,
            bounds=bounds,
            signals=signals,
            name=name,
        )
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure="AAER(1.0)")
        check_range(self, "loss_weight", loss_weight, 0, cure="AAER(loss_weight=2.5)")
        check_range(self, "logit_weight", logit_weight, 0, cure="AAER(logit_weight=1.5)")
        self.loss_weight = loss_weight
        self.logit_weight = logit_weight
        self.loss_gradient = loss_gradient

    def penalty(self, step: Step) -> Tensor | None:
        """Phase 4: keep the logits at the start; compare them with those at the end."""
        logits = step.logits
        if logits.ndim != 2:
            raise RegularizationError(
                self,
                f"compares one loss per sample and needs logits (B, C), got {tuple(logits.shape)}",
                cure='signals=Signals(logits="module.<name>")',
            )
        if self.attacking(step):
            step.kept[self._start_key] = logits.detach()
            return None
        targets = torch.as_tensor(step.targets)
        # A sample without a label has no loss that could fall or rise.
        start, _ = flatten(step.kept[self._start_key], targets)
        end, labels = flatten(logits, targets)
        labels = labels if step.target_distribution is None else step.target_distribution
        sums = step.comm.reduce(_sums(start, end, labels, self.loss_gradient))
        value = _penalty(sums, self.loss_weight, self.logit_weight)
        # In the second pass, whose penalties the engine does not log.
        step.log(self, value.detach(), joint=True)
        step.log(self, (sums[0] / (sums[0] + sums[1])).detach(), "abnormal_share", joint=True)
        return value

    @property
    def _start_key(self) -> str:
        return f"{self.name} start"


def _sums(start: Tensor, end: Tensor, targets: Tensor, loss_gradient: bool) -> Tensor:
    """Of abnormal and normal examples: their numbers, logit changes, and losses lost."""
    start = start.detach()
    labels = as_distribution(targets, end)
    lost = soft_cross_entropy(start, labels) - soft_cross_entropy(end, labels)
    if not loss_gradient:
        lost = lost.detach()
    abnormal = (lost.detach() > 0).to(end)
    normal = 1 - abnormal
    change = F.mse_loss(end, start, reduction="none").sum(1)
    return torch.stack(
        [
            abnormal.sum(),
            normal.sum(),
            (abnormal * change).sum(),
            (normal * change).sum().detach(),
            (abnormal * lost).sum(),
        ]
    )


def _penalty(sums: Tensor, loss_weight: float, logit_weight: float) -> Tensor:
    abnormal, normal, abnormal_change, normal_change, lost = sums.unbind()
    usual = (normal_change / normal.clamp_min(1)).detach()
    excess = (abnormal_change / abnormal.clamp_min(1) - usual).clamp_min(0)
    value = loss_weight * lost / abnormal.clamp_min(1) + logit_weight * excess
    both = (abnormal > 0) & (normal > 0)
    return torch.where(both, value * (abnormal / (abnormal + normal)).detach(), 0.0 * value)
