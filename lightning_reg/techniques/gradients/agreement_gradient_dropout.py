"""Drops entries of the gradient that the frozen model from before would not agree with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_reg.engine import (
    Paper,
    ParameterSelection,
    RegularizationError,
    Schedule,
    Signals,
    Step,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.divergence import tempered_divergence
from lightning_reg.mechanisms.second_gradient import SecondGradient
from lightning_reg.mechanisms.teacher import Teacher

__all__ = ["AgreementGradientDropout", "agreement_probability"]


def agreement_probability(task: Tensor, general: Tensor, eps: float = 1e-8) -> Tensor:
    """``P = (1 + sign(g_a) (g_a + g_b) / (|g_a| + |g_b| + eps)) / 2``: how likely an entry is kept.

    1 where both gradients have one sign (up to ``eps``), 1/2 where they cancel, and towards 0 as
    the second one outweighs the first against its direction.

    Args:
        task: ``g_a``, any shape: the gradient that is used.
        general: ``g_b``, of the same shape: the gradient of the divergence from the frozen model.
        eps: keeps what has no gradient from a division by 0.

    Returns:
        Of the same shape, in [0, 1].
    """
    agreement = task.sign() * (task + general) / (task.abs() + general.abs() + eps)
    return (1 + agreement) / 2


class AgreementGradientDropout(Teacher, SecondGradient):
    """Fine-tunes with the part of the gradient that does not work against the model from before.

    Zheng, Wu, Feng, Zhu, Liu, Zhao, Zha, Chen, Shen (2023), Regularized Mask Tuning: Uncovering
    Hidden Knowledge in Pre-trained Vision-Language Models (ICCV).

    With the gradient ``g_a`` of your loss and ``g_b`` of the divergence ``T^2 KL(frozen ||
    model)`` from the weights that training started with, each entry of ``g_a`` is kept with the
    probability ``P`` of :func:`agreement_probability` and multiplied by ``1 - lambda`` otherwise.
    The divergence votes only; nothing pulls the model back, as a penalty on it would. The paper
    trains masks with it (:class:`MaskTuning`); here it works on any weights.

    As in wuw2019/R-AMT@07f8d2c (``code/trainers/masktuning.py``; read, not run, since it needs
    CLIP), ``T = 1`` and ``eps = 1e-8`` included. There ``lambda`` is 0.3 for most data sets of 16
    samples a class, and 1 otherwise, as by default here. Its divergence is the cross-entropy with
    the frozen model's predictions, whose gradient is the same.

    Args:
        strength: ``lambda``, in [0, 1].
        temperature: ``T``, above 0.
        parameters: a regular expression on parameter names, or a ParameterSelection; ``None``
            takes all weights that learn.
        signals: where ``inputs`` and ``logits`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or no weight is chosen.
        UnsupportedError: if the module has no ``forward`` for the frozen copy, or cannot be
            copied; where weights are sharded over ranks.
        RegularizationError: in the first step, if logits are not (B, C), or the frozen copy
            answers others.

    Note:
        Over ranks: global; both gradients are those of the joint batch before they are compared,
        and draws are the same on all ranks. Under accumulation too: it acts once per optimizer
        step. Cost: the frozen model's forward pass, a second backward pass, a copy of the
        weights, the memory of a second gradient and, on several ranks, an all-reduce of it.
        Logged are the share of entries that are kept, and the divergence
        (``..._second_loss``).

        It hurts where the old task contradicts the new one: most of the gradient is dropped, and
        what is left of it is shorter and noisier.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AgreementGradientDropout
        >>> trainer = L.Trainer(callbacks=[AgreementGradientDropout()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language "
            "Models",
            "Zheng et al.",
            2023,
            None,
        ),
    )
    semantics: ClassVar[Semantics] = "global"
    exemptions: ClassVar[Mapping[str, str]] = {
        "precision": "an entry is kept or dropped by a draw against its probability, and rounding "
        "tips some of them over"
    }
    function: ClassVar[Callable[..., Any] | None] = staticmethod(agreement_probability)
    explanation: ClassVar[str] = "drops gradient entries that the frozen start disagrees with"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        temperature: float = 1.0,
        parameters: str | ParameterSelection | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength, source="reference", signals=signals, name=name, parameters=parameters
        )
        cure = "AgreementGradientDropout(temperature=1.0)"
        check_range(self, "temperature", temperature, 0, low_open=True, cure=cure)
        self.temperature = temperature

    def second_loss(self, step: Step) -> Tensor:
        """The divergence from the frozen model."""
        logits = step.logits
        if logits.ndim != 2:
            raise RegularizationError(
                self,
                f"compares predictions, and needs logits (B, C), got {tuple(logits.shape)}",
                cure='signals=Signals(logits="module.<name>")',
            )
        return tempered_divergence(logits, self.predict(step), self.temperature).mean()

    def combine(
        self, own: Tensor, second: Tensor, share: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Keep what the draw keeps, and the rest of the others."""
        draw = torch.rand(own.shape, generator=generator, device=own.device, dtype=own.dtype)
        kept = agreement_probability(own, second) > draw
        return torch.where(kept, own, (1 - share) * own), kept.to(own).mean()
