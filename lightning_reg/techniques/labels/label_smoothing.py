"""Moves a share of each label to all classes alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.target_transform import Replaces, TargetTransform

__all__ = ["LabelSmoothing", "label_smoothing"]


def label_smoothing(distribution: Tensor, smoothing: float) -> Tensor:
    """``q'(k) = (1 - epsilon) q(k) + epsilon / K``.

    Args:
        distribution: (..., K), rows that sum to 1.
        smoothing: ``epsilon`` in [0, 1].

    Returns:
        (..., K), rows that sum to 1.
    """
    return (1 - smoothing) * distribution + smoothing / distribution.shape[-1]


class LabelSmoothing(TargetTransform):
    """Trains against labels of which a share is spread over all classes.

    Szegedy, Vanhoucke, Ioffe, Shlens, Wojna (2015), Rethinking the Inception Architecture for
    Computer Vision, arXiv:1512.00567, section 7.

    ``q'(k|x) = (1 - epsilon) q(k|x) + epsilon u(k)`` with the uniform ``u(k) = 1/K`` that the
    paper uses, ``epsilon = 0.1`` as there. The loss is the cross-entropy with ``q'`` in nats,
    which is what ``F.cross_entropy(..., label_smoothing=epsilon)`` computes; the formula was
    checked against that. Labels that are soft or mixed already are smoothed as they are.

    What happens to labels: they stay in the batch as they are, so that metrics of your step go
    on counting them. The loss that is differentiated is computed from the logits of your step;
    the loss that you log is your own, without smoothing. Positions with the label -100, or with
    any label outside ``0..K-1`` that your loss ignores, do not count.

    Args:
        smoothing: ``epsilon`` in [0, 1], or a :class:`Schedule`; 0 turns the technique off.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy of logits and labels
            (checked in the first step), ``"term"`` if it has other terms, which are kept,
            ``"loss"`` to drop it.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``smoothing`` is outside [0, 1].
        RegularizationError: in the first step, if your loss is not the cross-entropy of the
            logits and labels that were found: class weights, a ``label_smoothing`` of its own,
            a sum over the batch.

    Note:
        Over ranks: global, since the loss is a mean of per-sample losses: DDP's mean over ranks
        with equally many samples is the joint mean. No collective. Cost: the cross-entropy once
        more.

        It hurts where probabilities matter and are right already (predictions come out
        underconfident), as a teacher for distillation, and beside other techniques that soften
        labels. :class:`ACLS` smooths where a prediction is too sure, and nowhere else.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import LabelSmoothing
        >>> trainer = L.Trainer(callbacks=[LabelSmoothing(0.1)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Rethinking the Inception Architecture for Computer Vision",
            "Szegedy et al.",
            2015,
            "1512.00567",
        ),
    )
    exclusive: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(label_smoothing)
    explanation: ClassVar[str] = (
        "your labels stay in the batch; the loss is the cross-entropy of the captured logits "
        "with smoothed labels"
    )

    def __init__(
        self,
        smoothing: float | Schedule = 0.1,
        *,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(smoothing, replaces=replaces, signals=signals, name=name)
        if not isinstance(smoothing, Schedule):
            check_range(self, "smoothing", smoothing, 0, 1, cure="LabelSmoothing(0.1)")

    def new_targets(self, distribution: Tensor, strength: float, step: Step) -> Tensor:
        """Smoothed labels."""
        return label_smoothing(distribution, strength)
