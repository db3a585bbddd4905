"""Keeps the training loss from falling below a level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals, Step
from lightning_reg.engine.criterion import soft_cross_entropy
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces

__all__ = ["Flooding", "flooding"]

FloodingPer = Literal["batch", "sample"]
_PER = ("batch", "sample")


def flooding(losses: Tensor, level: float, mean: Tensor | None = None) -> Tensor:
    """``s (l_i - b) + b`` of each sample, with ``s = sign(m - b)``, whose mean is ``|m - b| + b``.

    Args:
        losses: ``l`` (B,).
        level: ``b``.
        mean: ``m``, the mean whose sign counts (of all ranks, where there are several); ``None``
            floods each sample by itself (iFlood): ``|l_i - b| + b``.

    Returns:
        (B,), with a gradient of ``-1`` or ``+1`` by each loss.
    """
    above = (losses if mean is None else mean).detach() >= level
    gap = losses - level
    return gap.where(above, -gap) + level


class Flooding(LossReplacement):
    """Keeps the training loss from falling below a level: below it, gradients turn around.

    Ishida, Yamane, Sakai, Niu, Sugiyama (2020), Do We Need Zero Training Loss After Achieving Zero
    Training Error?, arXiv:2002.08709. By sample: Xie, Wang, Wang, Zheng, Sun, Yang (2022), iFlood:
    A Stable and Effective Regularizer (ICLR). Its effect as a gradient regularizer: Karakida,
    Takase, Hayase, Osawa (2022), arXiv:2210.02720.

    The cross-entropy ``L`` of a batch becomes ``|L - b| + b``: ordinary descent above ``b``,
    ascent below it, so that training goes on around the level instead of driving the loss to 0.
    Alternating ascent and descent lowers the norm of the gradient there, as a finite difference
    of it would. ``per="sample"`` (iFlood) takes ``|l_i - b| + b`` of each sample, so that no
    sample is driven to 0 while others keep the mean up.

    Confirmed against takashiishida/flooding (``synthetic/demo_synth.py``), whose loss is that of
    a batch; iFlood's formula is from memory of its paper, not checked. The papers search ``b`` on
    held-out data, in steps of 0.01 from 0 to about 0.2: it has no default.

    Args:
        strength: the share of the flooded loss, in [0, 1]; the rest stays the cross-entropy. With
            less than 1/2 the gradient never turns around.
        level: ``b``, at least 0, in nats.
        per: ``"batch"`` or ``"sample"``.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy, ``"term"`` if that is one
            of its terms, ``"loss"`` to drop whatever it is.
        signals: where ``logits`` and ``targets`` are, if not in the usual places.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``strength`` is outside [0, 1], ``level`` below 0, or another argument is
            none of its values.

    Note:
        Over ranks: global; the batch is that of all ranks, for one all-reduce of two numbers.
        Under accumulation it is the micro-batch; ``"sample"`` knows neither. The log shows the
        flooded loss.

        The training loss no longer says whether a model converges, and a level above what noise
        in the labels explains costs accuracy.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import Flooding
        >>> trainer = L.Trainer(callbacks=[Flooding(level=0.05)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Do We Need Zero Training Loss After Achieving Zero Training Error?",
            "Ishida et al.",
            2020,
            "2002.08709",
        ),
        Paper("iFlood: A Stable and Effective Regularizer", "Xie et al.", 2022, None),
        Paper(
            "Understanding Gradient Regularization in Deep Learning: Efficient Finite-Difference "
            "Computation and Implicit Bias",
            "Karakida et al.",
            2022,
            "2210.02720",
        ),
    )
    exemptions: ClassVar[Mapping[str, str]] = {
        "accumulation": "the loss that is compared with the level is that of a micro-batch"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(flooding)
    explanation: ClassVar[str] = "turns the loss around where it falls below a level"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        level: float,
        per: FloodingPer = "batch",
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        infinite = float("inf")
        cure = "Flooding(level=0.05)"
        check_range(self, "level", level, 0, infinite, high_open=True, cure=cure)
        if per not in _PER:
            problem = f"`per` must be one of {', '.join(_PER)}, got {per!r}"
            raise ArgumentError(self, problem, cure='Flooding(level=0.05, per="batch")')
        self.level = level
        self.per = per

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The flooded loss of each row."""
        plain = soft_cross_entropy(logits, distribution)
        mean = step.comm.mean(plain.detach()) if self.per == "batch" else None
        return flooding(plain, self.level, mean)
