"""What a technique can ask of the run, whatever the phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.split_work import Cost, Share

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_reg.engine.pipeline import TrainingStepPipeline
    from lightning_reg.engine.regularizer import Regularizer


class RunContext:
    """What a technique can ask of the run at any phase."""

    def __init__(self, pipeline: TrainingStepPipeline) -> None:
        self._pipeline = pipeline

    @property
    def trainer(self) -> pl.Trainer:
        """The Trainer of this run."""
        return self._pipeline.trainer

    @property
    def module(self) -> pl.LightningModule:
        """The user's module."""
        return self._pipeline.module

    @property
    def comm(self) -> Communicator:
        """Collectives over all ranks."""
        return self._pipeline.comm

    @property
    def device(self) -> torch.device:
        """The device of the module."""
        return self._pipeline.module.device

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return int(self._pipeline.trainer.current_epoch)

    @property
    def global_step(self) -> int:
        """Optimizer steps done so far."""
        return int(self._pipeline.trainer.global_step)

    @property
    def progress(self) -> float:
        """The share of the planned run that is done, in [0, 1]; 0 for an endless run."""
        return self._pipeline.progress()

    @property
    def logging(self) -> bool:
        """Whether this step's values are written (the Trainer's ``log_every_n_steps``)."""
        return self._pipeline.logging()

    def strength(self, technique: Regularizer) -> float:
        """The technique's strength now."""
        return self._pipeline.strength(technique)

    def share(self, weights: Mapping[str, torch.nn.Parameter], cost: Cost) -> Share:
        """This rank's part of work on weights: all of it, unless the strategy splits it."""
        return Share(weights)

    def log(
        self,
        technique: Regularizer,
        value: Tensor | float | None,
        suffix: str = "",
        *,
        joint: bool = False,
    ) -> None:
        """Log ``value`` under ``reg/<name>`` (``reg/<name>_<suffix>``); free on other steps.

        Args:
            technique: whose value it is.
            value: this rank's; the mean over ranks is what is logged.
            suffix: of the key.
            joint: the value is the same on all ranks and needs no collective.
        """
        if value is not None and self.logging:
            self._pipeline.collect_log(technique, value, suffix, joint)


__all__ = ["RunContext"]
