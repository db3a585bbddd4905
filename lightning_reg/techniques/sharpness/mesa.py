"""Keeps predictions near those of averaged weights: SAF without a table."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from lightning_reg.engine import Paper, Schedule, Signals, Step
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.divergence import tempered_divergence
from lightning_reg.mechanisms.teacher import Teacher


def mesa_divergence(logits: Tensor, average: Tensor, temperature: float = 5.0) -> Tensor:
    r"""How far each prediction is from that of the averaged weights.

    .. math:: T^2\, \mathrm{KL}\bigl(\mathrm{softmax}(\bar y / T) \,\Vert\,
        \mathrm{softmax}(y / T)\bigr)

    Args:
        logits: (B, C) :math:`y`; gradients flow through them alone.
        average: (B, C) :math:`\bar y`, the averaged model's logits.
        temperature: :math:`T`, above 0.

    Returns:
        (B,) in nats, at least 0.
    """
    return tempered_divergence(logits, average, temperature)


class MESA(Teacher):
    r"""Memory-efficient sharpness-aware training, MESA (Du, Zhou, Feng, Tan, Zhou 2022).

    :class:`SAF` with the predictions of an exponential moving average of the weights in the place
    of those that were kept some epochs ago:

    .. math:: \frac{\lambda}{|B|} \sum_i T^2\, \mathrm{KL}\bigl(\mathrm{softmax}(\bar y_i / T)
        \,\Vert\, \mathrm{softmax}(y_i / T)\bigr), \qquad
        \bar w \leftarrow \beta \bar w + (1 - \beta) w

    Confirmed with the official code (AngusDujw/SAF, ``MESA_train.py`` and ``run.sh``):
    ``strength`` 0.8, ``T`` 5, ``beta`` 0.9998, and the factor :math:`T^2`; ``start`` is 5 there,
    from which on *later* epochs have the term: 6 here, counted from 0. The paper's text has, from
    memory, ``T`` 1.5 and ``beta`` 0.9995. There BatchNorm statistics are averaged as weights are;
    here they are the current ones. The logged value is the mean divergence, in nats.

    Args:
        strength: :math:`\lambda`, at least 0.
        decay: :math:`\beta`, in [0, 1].
        temperature: :math:`T`, above 0.
        start: the first epoch (from 0) that has the term; the average starts with the first step.
        signals: where ``inputs`` and ``logits`` are.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: if the module has no ``forward`` that returns logits, cannot be copied,
            or has its weights sharded over ranks.

    Note:
        Over ranks: global. Under accumulation nothing changes: the average moves once per
        optimizer step. Cost: one forward pass without gradients in eval mode, from ``start`` on;
        one more copy of the weights, in checkpoints too, and its update. It hurts in short runs,
        whose average is still close to where training started: lower ``decay``.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MESA
        >>> trainer = L.Trainer(callbacks=[MESA(0.8, decay=0.9998)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("Sharpness-Aware Training for Free", "Du et al.", 2022, "2205.14083"),
    )
    semantics: ClassVar[Semantics] = "global"
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "logits", "weights"})
    function = staticmethod(mesa_divergence)
    explanation: ClassVar[str] = "keeps predictions near those of averaged weights"

    def __init__(
        self,
        strength: float | Schedule = 0.8,
        *,
        decay: float = 0.9998,
        temperature: float = 5.0,
        start: int = 6,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, source="ema", decay=decay, signals=signals, name=name)
        cure = "MESA(0.8, temperature=5.0)"
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=cure)
        check_range(
            self, "temperature", temperature, 0, math.inf, low_open=True, high_open=True, cure=cure
        )
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise ArgumentError(
                self, f"`start` must be a whole number from 0, got {start!r}", cure="MESA(start=6)"
            )
        self.temperature = temperature
        self.start = start

    def penalty(self, step: Step) -> JointMean | None:
        """Phase 4."""
        if step.epoch < self.start:
            return None
        return JointMean.of(mesa_divergence(step.logits, self.predict(step), self.temperature))


__all__ = ["MESA", "mesa_divergence"]
