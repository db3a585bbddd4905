"""Averages the weights at the ends of the last epochs, at a constant learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.technique import Semantics
from lightning_reg.engine.update import ParameterUpdate
from lightning_reg.mechanisms.averaged_weights import AveragedWeights, Statistics

Anneal = Literal["cos", "linear"]


def stochastic_average(
    average: Sequence[Tensor], weights: Sequence[Tensor], count: int
) -> list[Tensor]:
    r"""One step of an equal average: :math:`\bar w + (w - \bar w) / (n + 1)`.

    Args:
        average: :math:`\bar w`, of ``count`` weights, one tensor each.
        weights: :math:`w`, in the same shapes.
        count: :math:`n`, from 0.

    Returns:
        The average of ``count + 1`` weights; no argument is changed.
    """
    return list(torch._foreach_lerp(list(average), list(weights), 1 / (count + 1)))


class SWA(AveragedWeights):
    r"""Stochastic weight averaging, SWA (Izmailov, Podoprikhin, Garipov, Vetrov, Wilson 2018).

    From epoch ``start`` on, the weights at the end of each epoch are averaged with equal shares,
    :math:`\bar w \leftarrow \bar w + (w - \bar w) / (n + 1)`, and the learning rate is brought to
    ``lr``, constant and high enough for the weights to travel around the wide part of the valley,
    in whose middle the average lies.

    The average and the statistics of BatchNorm are those of ``torch.optim.swa_utils``
    (``AveragedModel``, ``update_bn``), the annealing is that of its ``SWALR``: over
    ``anneal_epochs`` from the learning rate at the start. A scheduler of one's own keeps running
    and is overruled. Lightning's ``StochasticWeightAveraging`` takes the weights at the *start*
    of each epoch, so that those of the last one are missing and those before the first change of
    the learning rate are in; it validates and saves the weights of training until the last
    epoch, and takes each rank's statistics from its own data.

    Args:
        start: the first epoch (from 0) whose end is averaged; a share of ``max_epochs`` where it
            is a float.
        lr: the constant learning rate of all parameter groups; ``None`` leaves the schedule alone.
        anneal_epochs: over which ``lr`` is reached.
        anneal: ``"cos"`` or ``"linear"``.
        every: average after every n-th epoch (a cycle's length).
        evaluate: validate, test and predict with the average, once there is one.
        final: leave the average in the module at the end of training.
        statistics: of BatchNorm under the average: ``"recompute"``: of a pass over the training
            data before each validation and at the end; ``"average"``, ``"current"``.
        name: the name in checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range, or ``start`` is a share and the Trainer
            has no ``max_epochs``.
        ConflictError: beside another average of weights, Lightning's included.
        UnsupportedError: where weights are sharded over ranks; for ``"recompute"`` under manual
            optimization or without a map-style dataset.

    Note:
        Over ranks: replica; every rank holds the same average, and statistics are those of all
        ranks' data. Cost: one more copy of the weights in float32 at least, a copy back and forth
        around each validation, and with BatchNorm a forward pass over the training set before
        each validation and at the end. A checkpoint holds the average as ``state_dict`` (with
        averaged statistics, if it is written in the middle of training) and the weights of
        training: ``load_from_checkpoint`` gives the average, ``fit(ckpt_path=...)`` goes on with
        the weights of training. It hurts with a small learning rate, whose average is its last
        weights, and with a too large one. A second ``fit`` on the same module starts from the
        average.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import SWA
        >>> trainer = L.Trainer(callbacks=[SWA(0.75, lr=0.05)], max_epochs=20, logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Averaging Weights Leads to Wider Optima and Better Generalization",
            "Izmailov et al.",
            2018,
            "1803.05407",
        ),
    )
    semantics: ClassVar[Semantics] = "replica"
    function = staticmethod(stochastic_average)
    explanation: ClassVar[str] = "averages the weights at the ends of the last epochs"

    def __init__(
        self,
        start: int | float = 0.75,
        *,
        lr: float | None = None,
        anneal_epochs: int = 10,
        anneal: Anneal = "cos",
        every: int = 1,
        evaluate: bool = True,
        final: bool = True,
        statistics: Statistics = "recompute",
        name: str | None = None,
    ) -> None:
        super().__init__(evaluate=evaluate, final=final, statistics=statistics, name=name)
        cure = "SWA(0.75, lr=0.05)"
        check_range(self, "start", start, 0, None if isinstance(start, int) else 1, cure=cure)
        if lr is not None:
            check_range(self, "lr", lr, 0, math.inf, low_open=True, high_open=True, cure=cure)
        for argument, value, low in (("anneal_epochs", anneal_epochs, 0), ("every", every, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ArgumentError(
                    self,
                    f"`{argument}` must be a whole number from {low}, got {value!r}",
                    cure=f"SWA({argument}={max(low, 1)})",
                )
        if anneal not in ("cos", "linear"):
            raise ArgumentError(
                self,
                f"`anneal` must be one of cos, linear, got {anneal!r}",
                cure='SWA(anneal="cos")',
            )
        self.start = start
        self.lr = lr
        self.anneal_epochs = anneal_epochs
        self.anneal: Anneal = anneal
        self.every = every
        self._first = 0
        self._rates: list[float] = []

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A share needs a whole."""
        super().validate(trainer, pl_module)
        epochs = trainer.max_epochs
        if isinstance(self.start, int):
            self._first = self.start
            return
        if epochs is None or epochs < 1:
            raise ArgumentError(
                self,
                f"starts after a share of the epochs, and the Trainer has no `max_epochs` "
                f"(it is {epochs})",
                cure="SWA(start=150)",
            )
        self._first = int(self.start * epochs)

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that starts anew has its own learning rates."""
        super().on_reference(trainer, pl_module)
        if int(trainer.global_step) == 0:
            self._rates = []

    def edit_gradients(self, update: ParameterUpdate) -> None:
        """Set the learning rates of the step, whatever a scheduler made of them."""
        if self.lr is None or update.epoch < self._first or update.optimizer is None:
            return
        groups = update.optimizer.param_groups
        if not self._rates:
            self._rates = [float(group["lr"]) for group in groups]
        done = self._annealed(update.epoch - self._first)
        for group, before in zip(groups, self._rates, strict=True):
            group["lr"] = before + (self.lr - before) * done

    def share(self, update: ParameterUpdate) -> float | None:
        """An equal one at the end of an epoch, before it is validated."""
        since = update.epoch - self._first
        if since < 0 or since % self.every or not update.trainer.is_last_batch:
            return None
        return 1 / (self.count + 1)

    def _annealed(self, epochs: int) -> float:
        share = 1.0 if self.anneal_epochs == 0 else min(1.0, epochs / self.anneal_epochs)
        return share if self.anneal == "linear" else (1 - math.cos(math.pi * share)) / 2

    def state_dict(self) -> dict[str, Any]:
        """The average, and the learning rates at its start."""
        return {**super().state_dict(), "rates": list(self._rates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        super().load_state_dict(state_dict)
        self._rates = list(state_dict["rates"])


__all__ = ["SWA", "stochastic_average"]
