"""Weights samples by where their loss lies between the smallest and the largest of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.engine import (
    ArgumentError,
    Paper,
    ParameterUpdate,
    Schedule,
    Signals,
    Step,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.loss_replacement import Replaces
from lightning_reg.mechanisms.sample_reweighting import SampleReweighting

__all__ = ["DynamicLossReweighting", "dynamic_loss_reweighting"]

Strategy = Literal["linupper", "quadratic", "extremes"]
# Of the loss h, which lies in [-1, 1].
_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h: (h + 1).clamp_max(1),
    "quadratic": lambda h: 1 - h.square(),
    "extremes": torch.abs,
}
_RANGE_FLOOR = 1e-6


def dynamic_loss_reweighting(
    losses: Tensor, temperature: float, strategy: Strategy = "linupper"
) -> Tensor:
    """``w = softmax(s(h) / r)`` with ``h = (2 l - l_max - l_min) / (l_max - l_min)``.

    Args:
        losses: (N,) ``l``, of the joint batch.
        temperature: ``r``, above 0; the larger, the more equal the weights.
        strategy: the score ``s(h)``: ``"linupper"`` ``min(h + 1, 1)``, in which the easier half
            counts less; ``"quadratic"`` ``1 - h^2``, in which the middle counts most;
            ``"extremes"`` ``|h|``, in which it counts least.

    Returns:
        (N,) positive weights that sum to one; equal ones for equal losses.
    """
    low, high = torch.aminmax(losses)
    # Not l / range - mean / range, which rounds to noise where all losses are nearly equal.
    h = (2 * losses - high - low) / (high - low).clamp_min(_RANGE_FLOOR)
    return torch.softmax(_SCORES[strategy](h) / temperature, dim=0)


class DynamicLossReweighting(SampleReweighting):
    """Weights samples by their present loss, so that redundant ones count less.

    Sow, Woisetschläger, Bulusu, Wang, Jacobsen, Liang (2025), Dynamic Loss-Based Sample
    Reweighting for Improved Large Language Model Pretraining, ICLR 2025.

    Losses are mapped to ``h`` in [-1, 1] by the smallest and the largest of the batch; a score
    ``s(h)`` and a temperature ``r`` make the weights ``w_i = softmax(s(h_i) / r)``, here times
    the number of samples, so that their mean is one. Scores: ``linupper`` ``min(h + 1, 1)``
    takes weight from easy samples only, and the paper finds that it works best; ``quadratic``
    ``1 - h^2`` prefers the middle; ``extremes`` ``|h|`` both ends. Weights carry no gradient.

    Confirmed with the official code (sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025, README
    and src/trainer.py). ``temperature`` 0.4 and ``warmup`` 1000 are those of most of its
    configurations; one takes temperature 1. Its code also has an unpublished score, left out.

    The logged value is the effective sample size, a share of the batch in (0, 1].

    Args:
        strength: the share of the weighted loss in [0, 1]; the rest is the plain mean.
        strategy: the score: ``"linupper"``, ``"quadratic"`` or ``"extremes"``.
        temperature: ``r``, above 0; a Schedule anneals it.
        warmup: optimizer steps without weights, in which losses do not yet tell samples apart.
        replaces: what of the user's loss the weighted cross-entropy replaces:
            ``"cross_entropy"`` (checked to be it), ``"term"`` or ``"loss"``.
        signals: where ``logits`` and ``targets`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        RegularizationError: in the first step, if the user's loss is no cross-entropy and
            ``replaces`` does not say what to do.

    Note:
        Over ranks: global; losses of all ranks are gathered in each step, since smallest,
        largest and the softmax are those of the joint batch. Under accumulation each micro-batch
        is weighted by itself. A sequence counts with the mean loss of its tokens, which all get
        its weight. Cost: a gather of one number per sample.

        It hurts with wrong labels, whose losses are large: ``linupper`` and ``extremes`` favour
        them. A large outlier among the losses makes all others look equally easy.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import DynamicLossReweighting
        >>> trainer = L.Trainer(callbacks=[DynamicLossReweighting(warmup=100)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
            "Sow et al.",
            2025,
            None,
        ),
    )
    exemptions: ClassVar[dict[str, str]] = {
        "accumulation": "smallest and largest loss, and the softmax, are those of one micro-batch",
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(dynamic_loss_reweighting)
    explanation: ClassVar[str] = "weights samples by their present loss"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        strategy: Strategy = "linupper",
        temperature: float | Schedule = 0.4,
        warmup: int = 1000,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        if strategy not in _SCORES:
            raise ArgumentError(
                self,
                f"`strategy` must be one of {', '.join(_SCORES)}, got {strategy!r}",
                cure='DynamicLossReweighting(strategy="linupper")',
            )
        if not isinstance(temperature, Schedule):
            cure = "DynamicLossReweighting(temperature=0.4)"
            check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        check_range(self, "warmup", warmup, 0, cure="DynamicLossReweighting(warmup=1000)")
        self.strategy = strategy
        self.temperature = temperature
        self.warmup = warmup

    def active(self, context: Step | ParameterUpdate) -> bool:
        """Not before the end of the warm-up."""
        return context.global_step >= self.warmup and super().active(context)

    def weights(self, step: Step, losses: Tensor) -> Tensor:
        """The weights of the joint batch."""
        temperature = Schedule.of(self.temperature).value(
            step=step.global_step, epoch=step.epoch, progress=step.progress
        )
        return dynamic_loss_reweighting(losses, temperature, self.strategy)
