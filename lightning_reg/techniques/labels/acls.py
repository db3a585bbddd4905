"""Pulls logits together where a prediction is surer than a margin allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.mechanisms.output_penalty import OutputPenalty

__all__ = ["ACLS", "acls"]

Reference = Literal["minimum", "zero"]
_REFERENCES = ("minimum", "zero")


def acls(
    logits: Tensor,
    margin: float = 10.0,
    positive: float = 1.0,
    negative: float = 0.1,
    reference: Reference = "zero",
) -> Tensor:
    """The conditional smoothing of each row of logits.

    ``lambda_1 max(0, z_y - r - M)^2 + lambda_2 / (K - 1) sum_{j != y} max(0, z_y - z_j - M)^2``
    with ``y = argmax_j z_j``. References take no gradient: neither ``r`` in the first term, nor
    ``z_y`` in the second. So the first term pushes the largest logit down, and the second pushes
    the others up. Of several largest logits each counts as the largest.

    Args:
        logits: (..., K), K at least 2.
        margin: ``M``; distances below it are free.
        positive: ``lambda_1``.
        negative: ``lambda_2``.
        reference: ``r``: ``"zero"`` for 0, ``"minimum"`` for ``min_k z_k``.

    Returns:
        (...), in squared units of logits, at least 0.
    """
    fixed = logits.detach()
    largest = fixed.amax(-1, keepdim=True)
    is_largest = fixed == largest
    base = fixed.amin(-1, keepdim=True) if reference == "minimum" else torch.zeros_like(largest)
    down = (logits - base - margin).clamp_min(0).square()
    up = (largest - logits - margin).clamp_min(0).square() / (logits.shape[-1] - 1)
    return torch.where(is_largest, positive * down, negative * up).sum(-1)


class ACLS(OutputPenalty):
    """Smooths labels where the largest logit is further from the others than a margin.

    Park, Noh, Oh, Baek, Ham (2023), ACLS: Adaptive and Conditional Label Smoothing for Network
    Calibration, arXiv:2308.11911.

    ``L = CE + alpha [lambda_1 mean_i max(0, z_y - r - M)^2
    + lambda_2 mean_i 1/(K-1) sum_{j != y} max(0, z_y - z_j - M)^2]`` with
    ``y = argmax_j z_j`` of sample ``i``, and ``r`` 0 or ``min_k z_k``. Its gradient is what label
    smoothing adds to that of the cross-entropy, but it grows with the distance (adaptive) and is 0
    inside the margin (conditional); so it is a penalty on logits, and labels stay as they are. It
    does not look at labels: ``y`` is the predicted class.

    The official code (cvlab-yonsei/ACLS, ``calibrate/losses/acls.py``) has ``max(0, z_y - M)^2``
    in the first term, and the default ``reference="zero"`` gives its value and gradient.
    ``reference="minimum"`` is the paper's formula, from memory and not checked against its text.
    As in the code ``z_y`` is held fixed in the second term; that the minimum is held fixed in the
    first is the same rule, and ours. Then nothing fixes where the zero of the logits lies: they
    may drift without an end, as they did on small noisy data, to -4000 and the accuracy of chance.
    From zero such a drift has a price. Defaults of the code: ``alpha = 0.1``, ``lambda_1 = 1``,
    ``lambda_2 = 0.1``, ``M = 10``. It counts ignored positions in the penalty, which are left
    out here.

    Args:
        strength: ``alpha``, at least 0.
        margin: ``M``, at least 0, in units of logits. 10 suits logits of networks that are
            trained to the end; on logits that never spread as far the penalty is 0 throughout.
        positive: ``lambda_1``, at least 0.
        negative: ``lambda_2``, at least 0.
        reference: what the largest logit is measured from: ``"zero"`` or ``"minimum"``.
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
        own mean. Cost: a dozen elementwise operations over the logits.

        It excludes :class:`LabelSmoothing`: both move the same gradient. It hurts when the
        margin is small: then it works against the cross-entropy from the start.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import ACLS
        >>> trainer = L.Trainer(callbacks=[ACLS(0.1, margin=10.0)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "ACLS: Adaptive and Conditional Label Smoothing for Network Calibration",
            "Park et al.",
            2023,
            "2308.11911",
        ),
    )
    exclusive: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    function: ClassVar[Callable[..., Any] | None] = staticmethod(acls)
    explanation: ClassVar[str] = (
        "pulls logits together beyond a margin, as label smoothing does; labels stay as they are"
    )

    def __init__(
        self,
        strength: float | Schedule = 0.1,
        *,
        margin: float = 10.0,
        positive: float = 1.0,
        negative: float = 0.1,
        reference: Reference = "zero",
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, ignore_index=ignore_index, class_dim=class_dim, signals=signals, name=name
        )
        cure = "ACLS(0.1, margin=10.0, positive=1.0, negative=0.1)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(self, "margin", margin, 0, cure=cure)
        check_range(self, "positive", positive, 0, cure=cure)
        check_range(self, "negative", negative, 0, cure=cure)
        if reference not in _REFERENCES:
            raise ArgumentError(
                self,
                f"`reference` must be one of {', '.join(_REFERENCES)}, got {reference!r}",
                cure='ACLS(0.1, reference="zero")',
            )
        self.margin = margin
        self.positive = positive
        self.negative = negative
        self.reference = reference

    def values(self, logits: Tensor) -> Tensor:
        """The penalty of each row."""
        return acls(logits, self.margin, self.positive, self.negative, self.reference)
