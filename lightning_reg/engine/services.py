"""What a pipeline tells techniques, wherever in a step they are."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.planner import Plan
from lightning_reg.engine.random import stream
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.sampler import padding_mask
from lightning_reg.engine.sharding import gather_weights, shards_weights
from lightning_reg.engine.signals import SignalReader
from lightning_reg.engine.value_log import ValueLog


class RunServices:
    """Answers of one run: strengths, progress, random numbers, the log, trainable weights.

    Args:
        trainer: of the run.
        module: the user's.
        plan: its techniques.
        seed: of all their random numbers.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, plan: Plan, seed: int
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.plan = plan
        self.comm = Communicator.of(trainer)
        # A strategy that splits work on weights over ranks says whether the coming backward
        # averages gradients over ranks.
        self.averages: Callable[[], bool] | None = None
        self._seed = seed
        self._log = ValueLog()
        self._total_steps = 0.0
        self._holds_weights = False
        self._readers: dict[str, SignalReader] = {}

    def strength(self, technique: Regularizer) -> float:
        """The strength of ``technique`` at this point of the run."""
        strength = technique.strength
        # Asked several times a step: a number is told faster than that something is no Schedule.
        if isinstance(strength, (int, float)):
            return strength
        return strength.value(
            step=int(self.trainer.global_step),
            epoch=int(self.trainer.current_epoch),
            progress=self.progress(),
        )

    def splits_loss(self) -> bool:
        """Whether a rank may add its part of a term on weights to its own loss.

        Not where a rank follows the gradient of its own loss to other weights.
        """
        return self.averages is not None and not self.plan.phases["perturb"]

    def progress(self) -> float:
        """The share of the planned optimizer steps that is done; 0 for an endless run."""
        if not 0 < self._total_steps < float("inf"):
            return 0.0
        return min(1.0, int(self.trainer.global_step) / self._total_steps)

    def logging(self) -> bool:
        """Whether the Trainer writes this step's values."""
        return bool(self.trainer._logger_connector.should_update_logs)  # type: ignore[attr-defined]

    def collect_log(
        self, technique: Regularizer, value: Tensor | float, suffix: str, joint: bool
    ) -> None:
        """Keep a value for the log of this optimizer step; micro-batches are averaged."""
        self._log.collect(technique.name, value, suffix, joint=joint)

    def hold_weights(self) -> None:
        """Where FSDP2 shards weights: let the module hold whole ones until the next backward ends.

        For gradients that are differentiated again: FSDP2 gathers weights for the backward of a
        forward pass only.
        """
        if shards_weights(self.trainer):
            gather_weights(self.module)
            self._holds_weights = True

    def generator(self, name: str, shared: bool, per: str, *count: int) -> torch.Generator:
        """A fresh counter-based generator; no state has to be saved for an exact resume."""
        rank = -1 if shared else self.comm.rank
        return stream(self.module.device, self._seed, name, per, *count, rank)

    def reader(self, technique: Regularizer) -> SignalReader:
        """Where ``technique`` looks for its signals."""
        return self._readers[technique.name]

    def padding(self, batch_idx: int, size: int) -> Tensor | None:
        """Which samples of this rank's micro-batch a DistributedSampler repeated."""
        return padding_mask(self.trainer.train_dataloader, batch_idx, size, self.module.device)


__all__ = ["RunServices"]
