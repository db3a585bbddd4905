"""Pulls logits together beyond a margin, linearly: label smoothing as a constraint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.output_penalty import OutputPenalty

__all__ = ["MarginLabelSmoothing", "margin_label_smoothing"]


def margin_label_smoothing(logits: Tensor, margin: float = 10.0) -> Tensor:
    """``1/K sum_k max(0, max_j z_j - z_k - m)`` of each row.

    Args:
        logits: (..., K). Gradients flow through the largest logit too; of several largest ones
            each takes an equal part.
        margin: ``m``; distances below it are free.

    Returns:
        (...), in units of logits, at least 0.
    """
    distance = logits.amax(-1, keepdim=True) - logits
    return (distance - margin).clamp_min(0).mean(-1)


class MarginLabelSmoothing(OutputPenalty):
    """Lets logits differ by a margin and pulls them together beyond it (MbLS).

    Liu, Ben Ayed, Galdran, Dolz (2022), The Devil is in the Margin: Margin-based Label Smoothing
    for Network Calibration, arXiv:2111.15430.

    ``L = CE + alpha mean_i 1/K sum_k max(0, max_j z_ij - z_ik - m)``. Label smoothing adds a pull
    that is 0 only where all logits are equal; here the logits may be ``m`` apart before anything
    pulls. It does not look at labels. Confirmed against by-liu/MbLS
    (calibrate/losses/logit_margin_l1.py), whose defaults are ``m = 10`` and ``alpha = 0.1``. A
    quadratic pull, stronger on the predicted class than on the others, is :class:`ACLS`.

    Args:
        strength: ``alpha``, at least 0.
        margin: ``m``, at least 0, in units of logits. 10 suits logits of networks that are
            trained to the end; on logits that never spread as far the penalty is 0 throughout.
        ignore_index: positions with this label do not count.
        class_dim: where the classes lie, for logits of three dimensions or more; by default it
            follows from the labels' shape.
        signals: where ``logits`` and ``targets`` are; targets are optional.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if there are fewer than two classes.

    Note:
        Over ranks: global; the mean runs over the positions of all ranks, each counting once,
        for one all-reduce of two numbers a step. Under accumulation each micro-batch takes its
        own mean. Cost: a maximum and three elementwise operations over the logits.

        It excludes :class:`LabelSmoothing`: both move the same gradient. The pull does not grow
        with the distance, so a small ``alpha`` cannot hold a sample whose loss is large.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MarginLabelSmoothing
        >>> trainer = L.Trainer(callbacks=[MarginLabelSmoothing(0.1, margin=10.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "The Devil is in the Margin: Margin-based Label Smoothing for Network Calibration",
            "Liu et al.",
            2022,
            "2111.15430",
        ),
    )
    exclusive: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(margin_label_smoothing)
    explanation: ClassVar[str] = "pulls logits together beyond a margin; labels stay as they are"

    def __init__(
        self,
        strength: float | Schedule = 0.1,
        *,
        margin: float = 10.0,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        cure = "MarginLabelSmoothing(0.1, margin=10.0)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "margin", margin, 0, cure=cure)
        self.margin = margin

    def values(self, logits: Tensor) -> Tensor:
        """The penalty of each row."""
        return margin_label_smoothing(logits, self.margin)
