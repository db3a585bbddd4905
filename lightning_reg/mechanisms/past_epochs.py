"""Techniques that remember what each sample gave a fixed number of epochs ago.

A technique writes this epoch's rows with :meth:`PastEpochs.remember`, and reads those of ``lag``
epochs ago with :meth:`PastEpochs.recall_past`. The mechanism takes care of one table an epoch in
turn, of forgetting the oldest, so that a sample which was left out of an epoch has no past of
another, and of a resume inside an epoch; of all else the base does.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_reg.engine import ArgumentError, Schedule, Signals, Step
from lightning_reg.mechanisms.sample_memory import SampleMemoryRegularizer, SampleTable


class PastEpochs(SampleMemoryRegularizer):
    """Base of techniques with one table of samples for each of the last epochs.

    Args:
        strength: the multiplier. While a Schedule is at 0 the tables are kept up to date.
        lag: how many epochs ago, at least 1; ``lag + 1`` tables are held.
        num_samples: the length of the training set; ``None`` takes it from the dataloader.
        width: the numbers per sample; ``None`` takes it from the first rows.
        signals: where the technique finds its tensors.
        name: the name in logs and checkpoints.
    """

    def __init__(
        self,
        strength: float | Schedule,
        *,
        lag: int,
        num_samples: int | None = None,
        width: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, num_samples=num_samples, width=width, signals=signals, name=name)
        if not isinstance(lag, int) or isinstance(lag, bool) or lag < 1:
            raise ArgumentError(
                self,
                f"`lag` must be a whole number from 1, got {lag!r}",
                cure=f"{type(self).__name__}(lag=3)",
            )
        self.lag = lag
        self.tables = [SampleTable(self, num_samples, width) for _ in range(lag + 1)]
        self._begun = -1

    def recall_past(self, step: Step, width: int) -> tuple[Tensor, Tensor]:
        """The rows (B, width) of ``lag`` epochs ago, and whether (B,) each was written then."""
        table = self.tables[(step.epoch - self.lag) % len(self.tables)]
        memory = table.of(width).to(step.device)
        index = self._index(step)
        return memory.read(index), memory.seen[index.to(memory.seen.device)]

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the size of the training set."""
        for table in self.tables:
            table.begin(trainer)
        if int(trainer.global_step) == 0 and int(trainer.current_epoch) == 0:
            self._begun = -1
        # A run that is resumed inside an epoch does not start it.
        self.memory = self.tables[int(trainer.current_epoch) % len(self.tables)]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write this epoch's rows where those of ``lag + 1`` epochs ago are."""
        super().on_train_epoch_start(trainer, pl_module)
        epoch = int(trainer.current_epoch)
        self.memory = self.tables[epoch % len(self.tables)]
        # Resumed inside an epoch, the rows of its first part are kept.
        if epoch != self._begun:
            self.memory.forget()
        self._begun = epoch

    def state_dict(self) -> dict[str, Any]:
        """The tables."""
        return {"memories": [table.state_dict() for table in self.tables], "begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take saved tables."""
        saved = state_dict["memories"]
        if len(saved) != len(self.tables):
            raise ArgumentError(
                self,
                f"the checkpoint holds {len(saved)} epochs and lag={self.lag} needs "
                f"{len(self.tables)}",
                cure=f"{type(self).__name__}(lag={len(saved) - 1})",
            )
        for table, state in zip(self.tables, saved, strict=True):
            table.load_state_dict(state)
        self._begun = int(state_dict["begun"])


__all__ = ["PastEpochs"]
