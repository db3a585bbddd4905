"""Uses an exponential moving average of the weights in the place of the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.technique import Semantics
from lightning_reg.engine.update import ParameterUpdate
from lightning_reg.mechanisms.averaged_weights import AveragedWeights, Statistics


def exponential_average(
    average: Sequence[Tensor], weights: Sequence[Tensor], decay: float = 0.999
) -> list[Tensor]:
    r"""One step of the average: :math:`\beta \bar w + (1 - \beta) w`.

    Args:
        average: :math:`\bar w`, one tensor a weight.
        weights: :math:`w`, in the same shapes.
        decay: :math:`\beta`, in [0, 1].

    Returns:
        The new average; no argument is changed.
    """
    return list(torch._foreach_lerp(list(average), list(weights), 1 - decay))


class EMA(AveragedWeights):
    r"""Exponential moving average of the weights, :math:`\bar w \leftarrow \beta \bar w +
    (1 - \beta) w` after each optimizer step (Polyak and Juditsky 1992 for the plain average).

    Validation, test, prediction and checkpoints have the average; training goes on with its own
    weights and never sees it. With ``warmup`` the decay is that of TensorFlow's
    ``ExponentialMovingAverage``, :math:`\min(\beta, (1 + n) / (10 + n))` after ``n`` moves, so that
    the first weights are forgotten soon.

    Lightning's ``EMAWeightAveraging`` has the same average (``decay`` 0.999 is its default; equal
    to rounding). It differs: its checkpoint of ``save_weights_only=True`` holds the weights of
    training; after an exception in validation the module keeps the average; in half precision
    the average is kept in half precision, where a share of 0.001 is lost.

    Args:
        decay: :math:`\beta`, in [0, 1]; 0 is the weights themselves.
        warmup: start with a smaller decay.
        every: move the average after every n-th optimizer step.
        evaluate: validate, test and predict with the average.
        final: leave the average in the module at the end of training.
        statistics: of BatchNorm under the average: ``"average"``: their average, as of weights;
            ``"recompute"``: of a pass over the training data before each validation and at the
            end; ``"current"``: those of training.
        name: the name in checkpoints.

    Raises:
        ArgumentError: if ``decay`` is outside [0, 1], ``every`` is no whole number from 1, or
            ``statistics`` has no meaning.
        ConflictError: beside another average of weights, Lightning's included.
        UnsupportedError: where weights are sharded over ranks; for ``"recompute"`` under manual
            optimization or without a map-style dataset.

    Note:
        Over ranks: replica; every rank holds the same average, and statistics are those of all
        ranks' data. Under accumulation the average moves once per optimizer step. Cost: one more
        copy of the weights in float32 at least, one pass over them a step, and a copy back and
        forth around each validation. A checkpoint holds the average as ``state_dict`` (and once
        more in full precision) and the weights of training: ``load_from_checkpoint`` gives the
        average, ``fit(ckpt_path=...)`` goes on with the weights of training.
        It hurts in runs shorter than some multiples of ``1 / (1 - decay)`` steps. A second ``fit``
        on the same module starts from the average.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import EMA
        >>> trainer = L.Trainer(callbacks=[EMA(decay=0.999)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Acceleration of Stochastic Approximation by Averaging",
            "Polyak and Juditsky",
            1992,
            None,
        ),
    )
    semantics: ClassVar[Semantics] = "replica"
    function = staticmethod(exponential_average)
    explanation: ClassVar[str] = "evaluates and saves a moving average of the weights"

    def __init__(
        self,
        decay: float = 0.999,
        *,
        warmup: bool = False,
        every: int = 1,
        evaluate: bool = True,
        final: bool = True,
        statistics: Statistics = "average",
        name: str | None = None,
    ) -> None:
        super().__init__(evaluate=evaluate, final=final, statistics=statistics, name=name)
        check_range(self, "decay", decay, 0, 1, cure="EMA(decay=0.999)")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ArgumentError(
                self, f"`every` must be a whole number from 1, got {every!r}", cure="EMA(every=1)"
            )
        self.decay = decay
        self.warmup = warmup
        self.every = every

    def share(self, update: ParameterUpdate) -> float | None:
        """``1 - beta``."""
        if update.global_step % self.every:
            return None
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.count) / (10 + self.count))
        return 1 - decay


__all__ = ["EMA", "exponential_average"]
