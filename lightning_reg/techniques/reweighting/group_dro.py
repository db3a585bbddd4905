"""Trains for the group of samples that does worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import Replaces
from lightning_reg.mechanisms.sample_reweighting import GroupReweighting

__all__ = ["GroupDRO", "group_dro"]


def group_dro(weights: Tensor, losses: Tensor, step_size: float = 0.01) -> Tensor:
    """``q_g exp(eta L_g) / sum_h q_h exp(eta L_h)``: one step of exponentiated ascent.

    Args:
        weights: (G,) ``q``, above 0.
        losses: (G,) ``L``, the mean loss of each group, 0 for one that is not in the batch.
        step_size: ``eta``, at least 0.

    Returns:
        (G,), of sum 1. In logarithms, so that large losses do not overflow.
    """
    return (weights.log() + step_size * losses).softmax(0)


class GroupDRO(GroupReweighting):
    """Weights groups by how badly they do, for the worst group's loss.

    Sagawa, Koh, Hashimoto, Liang (2019), Distributionally Robust Neural Networks for Group Shifts:
    On the Importance of Regularization for Worst-Case Generalization, arXiv:1911.08731.

    ``min_theta max_q sum_g q_g L_g``: each step moves ``q_g <- q_g exp(eta L_g)``, normalized, and
    trains on ``sum_g q_g L_g`` at the new ``q``, with ``L_g`` the mean loss of the batch's samples
    of group ``g``. Groups that generalize worse because they are small get
    ``C / sqrt(n_g)`` added to the loss that moves ``q`` (``adjustment``). Confirmed with the
    official code (kohpangwei/group_DRO, loss.py): ``eta`` 0.01; a group that is not in the batch
    has the loss 0 there, too. With an adjustment its value has the margins in it, which change no
    gradient; this one does not. Its greedy variant for CVaR is left out.

    Without strong regularization (weight decay, early stopping) a network that fits every training
    sample has no worst group, and this gains nothing: the paper's main point.

    Args:
        strength: the share of the weighted loss in [0, 1]; the rest is the plain mean.
        num_groups: the groups are 0 to ``num_groups - 1``.
        step_size: ``eta``, at least 0; at 0 all groups weigh alike.
        adjustment: ``C``, at least 0.
        group_counts: ``n_g`` of the training set; needed for an ``adjustment``.
        replaces: what of the user's loss the weighted cross-entropy replaces:
            ``"cross_entropy"`` (checked to be it), ``"term"`` or ``"loss"``.
        signals: where ``domain`` (the group of each sample), ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Attributes:
        weights_of_groups: (G,) ``q``.

    Raises:
        ArgumentError: if a number is outside its range, or ``group_counts`` does not fit.
        MissingSignalError: in the first step, without groups.
        RegularizationError: if a group is none of ``num_groups``.

    Note:
        The logged value is the effective sample size, a share of the batch. A sample that was mixed
        belongs to the group of its own place in the batch. Over ranks: global;
        losses and groups of all ranks are gathered in each step, so that every rank holds the same
        ``q``, also where it has no sample of a group. Under accumulation ``q`` moves with each
        micro-batch. ``q`` is saved with the checkpoint; a batch whose loss is not finite does not
        move it. Cost: a gather of three numbers a sample.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import GroupDRO
        >>> trainer = L.Trainer(callbacks=[GroupDRO(num_groups=4)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Distributionally Robust Neural Networks for Group Shifts: On the Importance of "
            "Regularization for Worst-Case Generalization",
            "Sagawa et al.",
            2019,
            "1911.08731",
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "group weights move with each micro-batch",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(group_dro)
    explanation: ClassVar[str] = "weights groups of samples by how badly they do"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        num_groups: int,
        step_size: float = 0.01,
        adjustment: float = 0.0,
        group_counts: Sequence[float] | None = None,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, num_groups=num_groups, replaces=replaces, signals=signals, name=name
        )
        cure = "GroupDRO(num_groups=2, adjustment=1.0, group_counts=[900, 100])"
        check_range(self, "step_size", step_size, 0, cure=cure)
        check_range(self, "adjustment", adjustment, 0, cure=cure)
        self._check_counts(adjustment, group_counts, cure)
        self.step_size = step_size
        self.adjustment = adjustment
        self.group_counts = None if group_counts is None else [float(n) for n in group_counts]
        self.weights_of_groups = torch.full((num_groups,), 1.0 / num_groups)

    def group_weights(self, step: Step, losses: Tensor, counts: Tensor) -> Tensor:
        """``q``, moved by this batch."""
        weights = self.weights_of_groups.to(losses)
        if step.is_rerun:
            return weights
        moved = group_dro(weights, losses + self._margins(losses), self.step_size)
        # A loss that is not finite moves nothing.
        self.weights_of_groups = torch.where(torch.isfinite(moved).all(), moved, weights)
        return moved

    def state_dict(self) -> dict[str, Any]:
        """The weights of the groups."""
        return {**super().state_dict(), "weights_of_groups": self.weights_of_groups.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved weights."""
        super().load_state_dict(state_dict)
        self.weights_of_groups = state_dict["weights_of_groups"].clone()

    def _margins(self, losses: Tensor) -> Tensor | float:
        if self.group_counts is None:
            return 0.0
        return self.adjustment / torch.tensor(self.group_counts).to(losses).sqrt()

    def _check_counts(self, adjustment: float, counts: Sequence[float] | None, cure: str) -> None:
        if counts is None:
            if adjustment:
                raise ArgumentError(self, "`adjustment` needs `group_counts`", cure=cure)
            return
        if len(counts) != self.num_groups or not all(n > 0 for n in counts):
            raise ArgumentError(
                self,
                f"`group_counts` must hold a number above 0 for each of {self.num_groups} groups, "
                f"got {counts!r}",
                cure=cure,
            )
