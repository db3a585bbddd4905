"""Trains on the group that has the largest loss, or evens the groups' losses out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import Replaces
from lightning_reg.mechanisms.sample_reweighting import GroupReweighting

__all__ = ["WorstGroupLoss", "fairness_gap", "worst_group_loss"]

Form = Literal["worst", "gap"]
_FORMS = ("worst", "gap")


def worst_group_loss(losses: Tensor, counts: Tensor) -> Tensor:
    """``max_g L_g`` over the groups that have samples.

    Args:
        losses: (G,) the mean loss of each group.
        counts: (G,) the number of its samples.

    Returns:
        A scalar; its gradient is that of the worst group alone.
    """
    return losses.masked_fill(counts == 0, -torch.inf).max()


def fairness_gap(losses: Tensor, counts: Tensor, lam: float = 1.0) -> Tensor:
    """``L + lambda sum_g |L_g - L|`` with ``L`` the mean over samples.

    Args:
        losses: (G,) the mean loss of each group.
        counts: (G,) the number of its samples; groups without any have no gap.
        lam: ``lambda``, at least 0.

    Returns:
        A scalar.
    """
    mean = (losses * counts).sum() / counts.sum()
    return mean + lam * ((losses - mean) * (counts > 0)).abs().sum()


class WorstGroupLoss(GroupReweighting):
    """Replaces the mean loss by that of the worst group, or adds the gaps between groups.

    Junias et al. (2025), Assessing Algorithmic Bias in Language-Based Depression Detection: A
    Comparison of DNN and LLM Approaches, compares the two as fairness-aware losses and finds that
    the worst-group loss gives the better balance.

    ``form="worst"``: ``max_g L_g``. ``form="gap"``: ``L + lambda sum_g |L_g - L|``. The names are
    those of the paper's abstract; the forms are the common ones, from memory, not checked against
    code. For a softer choice of the group see :class:`GroupDRO`.

    Args:
        strength: the share of this loss in [0, 1]; the rest is the plain mean.
        num_groups: the groups are 0 to ``num_groups - 1``.
        form: ``"worst"`` or ``"gap"``.
        lam: ``lambda`` of ``"gap"``, at least 0.
        replaces: what of the user's loss the new one replaces: ``"cross_entropy"`` (checked to be
            it), ``"term"`` or ``"loss"``.
        signals: where ``domain`` (the group of each sample), ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if a number is outside its range, or ``form`` is none of the two.
        MissingSignalError: in the first step, without groups.
        RegularizationError: if a group is none of ``num_groups``.

    Note:
        The logged value is the effective sample size, a share of the batch. A sample that was mixed
        belongs to the group of its own place in the batch. Over ranks: global;
        losses and groups of all ranks are gathered in each step, so that all agree on the worst
        group, also those that have no sample of it (they then train on nothing in ``"worst"``).
        Under accumulation each micro-batch has its own worst group. Cost: a gather of three
        numbers a sample. ``"worst"`` throws the rest of the batch away: gradients are noisy.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import WorstGroupLoss
        >>> trainer = L.Trainer(callbacks=[WorstGroupLoss(num_groups=2)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Assessing Algorithmic Bias in Language-Based Depression Detection: A Comparison of "
            "DNN and LLM Approaches",
            "Junias et al.",
            2025,
            None,
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "each micro-batch has its own worst group and gaps",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(worst_group_loss)
    explanation: ClassVar[str] = "trains on the worst group, or on the gaps between groups"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        num_groups: int,
        form: Form = "worst",
        lam: float = 1.0,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, num_groups=num_groups, replaces=replaces, signals=signals, name=name
        )
        if form not in _FORMS:
            raise ArgumentError(
                self,
                f"`form` must be one of {', '.join(_FORMS)}, got {form!r}",
                cure='WorstGroupLoss(num_groups=2, form="worst")',
            )
        check_range(self, "lam", lam, 0, cure='WorstGroupLoss(num_groups=2, form="gap", lam=1.0)')
        self.form = form
        self.lam = lam

    def group_weights(self, step: Step, losses: Tensor, counts: Tensor) -> Tensor:
        """The gradient of the loss by the groups' mean losses: it is linear between two kinks."""
        with torch.enable_grad():
            at = losses.detach().requires_grad_()
            if self.form == "worst":
                value = worst_group_loss(at, counts)
            else:
                value = fairness_gap(at, counts, self.lam)
            (slope,) = torch.autograd.grad(value, at)
        return slope
