"""A loss between the cross-entropy, which fits, and the absolute error, which ignores outliers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces

__all__ = ["GeneralizedCrossEntropy", "generalized_cross_entropy"]

_TINY = 1e-12


def generalized_cross_entropy(
    logits: Tensor, distribution: Tensor, q: float = 0.7, k: float | None = None
) -> Tensor:
    """``sum_c t_c (1 - p_c^q) / q`` of each row.

    Args:
        logits: (N, C), ``p`` their softmax.
        distribution: (N, C) labels ``t``, one-hot or soft.
        q: in (0, 1]: towards 0 the cross-entropy in nats, at 1 the absolute error ``1 - p_y``.
        k: in (0, 1): a class with ``p_c <= k`` has the loss of ``p_c = k`` and no gradient;
            ``None`` truncates nothing.

    Returns:
        (N,), in [0, 1 / q]. The gradient by ``p_y`` is ``-p_y^(q - 1)``.
    """
    # The floor keeps the gradient of a class that is ruled out finite.
    p = logits.softmax(-1).clamp_min(_TINY if k is None else k)
    return (distribution * (1 - p.pow(q)) / q).sum(-1)


class GeneralizedCrossEntropy(LossReplacement):
    """Replaces the cross-entropy by ``(1 - p_y^q) / q``, which wrong labels bend less (GCE).

    Zhang, Sabuncu (2018), Generalized Cross Entropy Loss for Training Deep Neural Networks with
    Noisy Labels, arXiv:1805.07836.

    The cross-entropy weighs a sample's gradient by ``1 / p_y``, which a wrong label makes large;
    the absolute error does not weigh it at all and learns slowly. ``q`` goes from one (0) to the
    other (1). The truncated form gives no gradient to samples with ``p_y <= k``; the paper turns
    it on after a warm-up (``truncate_from``) and decides once in ten epochs which samples those
    are, with the best model so far; here each step decides with the model as it is, which needs
    no memory of samples. ``q`` 0.7 and ``k`` 0.5 are the paper's; the formula agrees with
    AlanChou/Truncated-Loss, TruncatedLoss.py, and the truncated one in each step with
    Optimization-AI/ICML2023_LDR, loss.py. Soft labels are ours.

    Args:
        strength: the share of this loss in [0, 1]; the rest stays the cross-entropy.
        q: in (0, 1].
        k: in (0, 1), the probability below which a sample is given up; ``None`` gives none up.
        truncate_from: the epoch from which ``k`` counts (40 of 120 in the paper).
        replaces: what of the user's loss goes: ``"cross_entropy"`` (checked), ``"term"`` or
            ``"loss"``.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if a number is outside its range.
        RegularizationError: in the first step, if the user's loss is no cross-entropy and
            ``replaces`` does not say what to do.

    Note:
        Over ranks: global, being a mean over samples; nothing is communicated. Accumulation
        changes nothing. Cost: a softmax and a power per logit. It underfits many classes at
        large ``q``: gradients start at the size of ``p_y^q``.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import GeneralizedCrossEntropy
        >>> trainer = L.Trainer(callbacks=[GeneralizedCrossEntropy(q=0.7)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
            "Zhang and Sabuncu",
            2018,
            "1805.07836",
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(generalized_cross_entropy)
    explanation: ClassVar[str] = "replaces the cross-entropy by (1 - p^q) / q"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        q: float = 0.7,
        k: float | None = None,
        truncate_from: int = 0,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        cure = "GeneralizedCrossEntropy(q=0.7, k=0.5, truncate_from=40)"
        check_range(self, "q", q, 0, 1, low_open=True, cure=cure)
        if k is not None:
            check_range(self, "k", k, 0, 1, low_open=True, high_open=True, cure=cure)
        check_range(self, "truncate_from", truncate_from, 0, cure=cure)
        self.q = q
        self.k = k
        self.truncate_from = truncate_from

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss of each row."""
        k = self.k if step.epoch >= self.truncate_from else None
        return generalized_cross_entropy(logits, distribution, self.q, k)
