"""Trains with another calibrated loss in every batch, drawn at random: dropout over losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces

__all__ = ["EnsLoss", "ens_loss"]

_FLOOR = 1e-6


def ens_loss(
    margins: Tensor, draws: Tensor, box_cox: float | Tensor = 0.0, batch: Tensor | None = None
) -> Tensor:
    """``phi'(z) z`` with the slope ``phi'(z)`` held fixed: a random loss by its gradient.

    Slopes are ``-v`` for the positive numbers ``v = (1 + lambda d)^(1/lambda)`` (``exp(d)`` at 0)
    of normal draws ``d``, at most 1, in the order of the margins: the smallest margin has the
    steepest. Beyond a margin of 1 they are divided by it. So ``phi`` is convex, falls at 0, and is
    no steeper than ``1 / z`` at the right. Equal margins have equal slopes.

    Args:
        margins: (...) ``z = y f``.
        draws: (M,), as many as the batch has margins.
        box_cox: ``lambda`` of the inverse Box-Cox transformation.
        batch: all margins (M,) that are ordered together; by default ``margins``.

    Returns:
        (...). The values mean nothing; the gradient by ``z`` is the slope.
    """
    return slopes(margins.detach(), draws, box_cox, batch) * margins


def slopes(
    margins: Tensor, draws: Tensor, box_cox: float | Tensor = 0.0, batch: Tensor | None = None
) -> Tensor:
    """``phi'(z)`` of each margin, below 0; see :func:`ens_loss`."""
    steepest_first = (-_inverse_box_cox(draws, box_cox)).clamp_min(-1.0).sort().values
    ordered = (margins if batch is None else batch).reshape(-1).sort().values
    place = torch.searchsorted(ordered, margins.contiguous()).clamp_max(len(draws) - 1)
    return steepest_first[place] / margins.clamp_min(1.0) - _FLOOR


def _inverse_box_cox(draws: Tensor, box_cox: float | Tensor) -> Tensor:
    if not isinstance(box_cox, Tensor) and box_cox == 0:
        return draws.exp()
    return (1 + box_cox * draws).clamp_min(0.0) ** (1 / box_cox)


class EnsLoss(LossReplacement):
    """Trains with another convex, calibrated loss in every batch (EnsLoss).

    Dai (2024), EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in
    Classification.

    Hinge, logistic and exponential loss all lead to the same classifier in the end, and which
    overfits least is not known before. EnsLoss draws one anew in each batch, through its slope
    alone: random negative numbers, sorted so that the loss is convex (steeper at smaller margins
    ``z = y f``), negative at 0 (which makes it calibrated), and damped by ``1/z`` beyond ``z = 1``
    (so that the loss stays bounded below). Gradients are those slopes; the logged number is not
    the value of any loss, and may rise while training goes well.

    Confirmed against statmlben/ensLoss (losses.py, ``ensLoss``): slopes from the inverse Box-Cox
    transformation of normal draws, cut at 1, with a floor of 1e-6; ``box_cox = 0`` is its default,
    and with ``period`` it draws ``lambda`` uniformly from (-1, 1) every so many epochs, counted
    from 1. There margins that are equal get different slopes, by their place in the batch; here
    they get the same, as those of a function.

    The method is binary: with two classes ``f = z_1 - z_0``. More classes are ours: one margin per
    class against the rest, ``(2 q_c - 1) z_c``, all ordered together and summed over classes. Soft
    labels shrink a margin by ``2 q - 1``.

    Args:
        strength: the share of the new loss, in [0, 1]; the rest stays the cross-entropy.
        box_cox: ``lambda``, in [-1, 1], of the transformation that draws pass.
        period: draw ``lambda`` anew every so many epochs; ``None`` never does.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy, ``"term"`` if that is one
            of its terms, ``"loss"`` to drop whatever it is.
        signals: where ``logits`` and ``targets`` are. A binary output of one column (B, 1), with
            integer labels (B,), is the two-class one of logits (0, z):
            ``Signals(logits=lambda step: F.pad(step.outputs["logits"], (1, 0)))``.
        name: the name in logs, checkpoints and random streams.

    Raises:
        ArgumentError: if an argument is outside its range.

    Note:
        Over ranks: global; draws are the same on all ranks, and margins are ordered among those
        of all ranks, for one gather of a number per sample (and class). Micro-batches draw losses
        of their own. ``reg/ens_loss_margin`` shows the mean margin. Cost: two sorts of as many
        numbers.

        Outputs are scores whose sign or order counts: a softmax of them is no probability. It
        brings nothing where a fixed loss does not overfit, and small batches make coarse losses.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import EnsLoss
        >>> trainer = L.Trainer(callbacks=[EnsLoss()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in "
            "Classification",
            "Dai",
            2024,
            None,
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "each micro-batch draws a loss of its own, as each batch does"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(ens_loss)
    explanation: ClassVar[str] = "replaces the cross-entropy by a random convex loss in each batch"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        box_cox: float = 0.0,
        period: int | None = None,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        check_range(self, "box_cox", box_cox, -1, 1, cure="EnsLoss(box_cox=0.0)")
        if period is not None and (
            not isinstance(period, int) or isinstance(period, bool) or period < 1
        ):
            raise ArgumentError(
                self,
                f"`period` must be a whole number of epochs from 1 or None, got {period!r}",
                cure="EnsLoss(period=10)",
            )
        self.box_cox = box_cox
        self.period = period

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The slope times the margin, of each row; the sum over classes where there are more."""
        margins = _margins(logits, distribution)
        joint = step.comm.gather(margins.detach())
        generator = step.rng(self, shared=True)
        draws = torch.randn(joint.numel(), generator=generator, device=joint.device).to(joint)
        values = ens_loss(margins, draws, self._lambda(step), joint)
        if not step.is_rerun:
            step.log(self, margins.detach().mean(), "margin")
        return values.sum(-1)

    def _lambda(self, step: Step) -> float | Tensor:
        """The number of this epoch, which follows from the epoch: a resume has no state to keep."""
        drawn = 0 if self.period is None else (step.epoch + 1) // self.period
        if drawn == 0:
            return self.box_cox
        assert self.pipeline is not None
        generator = self.pipeline.generator(self.name, True, "box_cox", drawn)
        uniform: Tensor = torch.rand((), generator=generator, device=generator.device)
        return 2 * uniform - 1


def _margins(logits: Tensor, distribution: Tensor) -> Tensor:
    """(N, 1) for two classes, (N, C) against the rest for more."""
    if logits.shape[-1] == 2:
        side, score = distribution[:, 1:] - distribution[:, :1], logits[:, 1:] - logits[:, :1]
        return side * score
    return (2 * distribution - 1) * logits
