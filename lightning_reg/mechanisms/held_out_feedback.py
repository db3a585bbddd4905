"""Techniques that adjust themselves to held-out predictions after each validation of a fit.

A technique supplies :meth:`HeldOutFeedback.summary`: what it needs of each row of logits and
labels; and :meth:`HeldOutFeedback.adjust`: what it learns from the rows of all ranks. The
mechanism takes care of

- one pass of ``self(inputs)`` over the held-out data, in evaluation mode and without gradients,
  after each validation of a fit, and not after the sanity check;
- finding logits and labels, of any layout, without positions that do not count;
- the rows of all ranks, together on every rank; what a DistributedSampler repeats is left out.

It is added to the mechanism by which the technique acts: ``class X(HeldOutFeedback, ...)``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import RegularizationError, Regularizer
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.criterion import as_distribution, belong, flatten
from lightning_reg.engine.observe import held_out_steps, validation_loaders
from lightning_reg.engine.stages import fitting
from lightning_reg.engine.step import Step


class HeldOutFeedback(Regularizer):
    """Base of techniques that learn from held-out predictions.

    Attributes:
        dataloader: held-out data; ``None`` for the first validation dataloader.
    """

    dataloader: Any = None

    @abstractmethod
    def summary(self, logits: Tensor, distribution: Tensor) -> Tensor:
        """What is kept (N, K) of logits (N, C) and labels (N, C), without gradients."""

    @abstractmethod
    def adjust(self, rows: Tensor) -> None:
        """Learn from the rows (N, K) of all ranks; every rank is given the same ones."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at held-out predictions, if this validation belongs to a fit."""
        super().on_validation_end(trainer, pl_module)
        if not fitting(trainer) or trainer.sanity_checking:
            return
        loader = validation_loaders(trainer)[0] if self.dataloader is None else self.dataloader
        steps = held_out_steps(self, trainer, pl_module, loader)
        with torch.inference_mode(False), torch.no_grad():
            rows = [self._summary_of(step, counted).clone() for step, counted in steps]
            width = max((row.shape[1] for row in rows), default=0)
            comm = Communicator.of(trainer)
            device = trainer.strategy.root_device
            width = int(comm.reduce(torch.tensor(width, device=device), "max"))
            own = torch.cat(rows) if rows else torch.zeros(0, width, device=device)
            self.adjust(comm.gather(own))

    def _summary_of(self, step: Step, counted: Tensor | None) -> Tensor:
        logits, targets = step.logits, torch.as_tensor(step.targets)
        if not belong(logits, targets):
            raise RegularizationError(
                self,
                f"held-out logits {tuple(logits.shape)} and targets {tuple(targets.shape)} are "
                "not those of one classification",
                cure='signals=Signals(logits="module.<name>", targets="batch.<key>")',
            )
        if counted is not None:
            logits, targets = logits[counted], targets[counted]
        rows, labels = flatten(logits, targets)
        return self.summary(rows, as_distribution(labels, rows))


__all__ = ["HeldOutFeedback"]
