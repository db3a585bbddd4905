"""Other ways to bring the gradients of all ranks together than their mean.

A technique supplies :meth:`GradientAggregation.client_weights`: from the Gram matrices of the
ranks' gradients, one for each parameter tensor, the share with which each rank's gradient counts.
The mechanism takes care of

- the moment: in the place of DDP's own reduction, so that loss scaling, penalties on weights,
  gradient edits, clipping and optimizers see the aggregated gradient, the same bits on every rank;
- accumulation: a rank's gradient is that of its whole window of micro-batches;
- a strength below 1, which takes that share of the way from the mean;
- gradients that are not finite on some rank: the mean, which is then finite on no rank, so that
  scalers of all ranks skip the step;
- the log: the cosine between what is used and the mean.

Ranks are the clients. In one process there is a single one, whose gradient stays as it is.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import ParameterUpdate, Regularizer, Schedule, UnsupportedError
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.selected_weights import check_share


class GradientAggregation(Regularizer):
    """Base of techniques that replace the mean of the ranks' gradients.

    Args:
        strength: the share of the way from the mean to the aggregate, in [0, 1].
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "local"
    sharded: ClassVar[bool | None] = False
    # Before every edit: those read the gradients that this one makes.
    writes: ClassVar[frozenset[str]] = frozenset({"gradients"})
    exclusive: ClassVar[frozenset[str]] = frozenset({"gradient_aggregation"})

    def __init__(self, strength: float | Schedule = 1.0, *, name: str | None = None) -> None:
        super().__init__(strength, name=name)
        check_share(self, strength)
        self._products: list[Tensor] = []

    @abstractmethod
    def client_weights(self, grams: Tensor) -> Tensor:
        """The share of each client.

        Args:
            grams: ``<g_i, g_j>`` (T, R, R) of R clients for T tensors, in float64 and finite.

        Returns:
            (T, R); ``1 / R`` everywhere is the mean.
        """

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the place of DDP's reduction."""
        self._products = []
        comm = Communicator.of(trainer)
        if comm.world_size == 1:
            return
        model: Any = trainer.strategy.model
        self._check_reduction(trainer, model)
        # Not the method itself: DDP reads annotations as objects, and here they are strings.
        try:
            model.register_comm_hook(None, lambda state, bucket: self._reduce(comm, bucket))
        except RuntimeError as error:
            raise UnsupportedError(
                self,
                f"takes the place of DDP's reduction, which another hook has taken ({error})",
                cure="DDPStrategy(ddp_comm_hook=None)",
            ) from error

    def edit_gradients(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 7: the gradients have been aggregated by the backward; how far from the mean?"""
        products, self._products = self._products, []
        if not products:
            return None
        both, own, mean = torch.stack(products).sum(0).unbind()
        return both / (own * mean).sqrt().clamp_min(torch.finfo(both.dtype).tiny)

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the last backward."""
        self._products = []

    # ------------------------------------------------------------------ in the backward

    def _reduce(self, comm: Communicator, bucket: Any) -> torch.futures.Future[Tensor]:
        """What DDP waits for: the reduced bucket."""
        own = bucket.buffer()
        sizes = [gradient.numel() for gradient in bucket.gradients()]
        strength = 0.0 if self.pipeline is None else self.pipeline.strength(self)
        with torch.no_grad():
            if strength == 0:
                reduced = comm.reduce(own, "mean")
            else:
                reduced = self._aggregate(full_precision(comm.stack(own)), sizes, strength)
        future = _future(own.device)
        future.set_result(reduced.to(own.dtype))
        return future

    def _aggregate(self, rows: Tensor, sizes: list[int], strength: float) -> Tensor:
        """One gradient of the rows (R, P) of all clients."""
        tensors = rows.split(sizes, dim=1)
        grams = torch.stack([t @ t.T for t in tensors]).double()
        finite = grams.isfinite().all(-1).all(-1)
        even = torch.full_like(grams[:, 0], 1 / len(rows))
        weights = self.client_weights(grams.where(finite[:, None, None], 0.0))
        chosen = torch.lerp(even, weights, strength).where(finite[:, None], even).to(rows.dtype)
        found = torch.cat([w @ t for w, t in zip(chosen.unbind(), tensors, strict=True)])
        if self.pipeline is not None and self.pipeline.logging():
            mean = rows.mean(0)
            self._products.append(torch.stack([found @ mean, found @ found, mean @ mean]))
        return found

    def _check_reduction(self, trainer: pl.Trainer, model: Any) -> None:
        if not hasattr(model, "register_comm_hook"):
            raise UnsupportedError(
                self,
                f"takes the place of DDP's reduction, and {type(trainer.strategy).__name__} has "
                "none",
                cure='Trainer(strategy="ddp_reg")',
            )
        if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
            raise UnsupportedError(
                self,
                "takes the place of DDP's reduction, and so does the strategy's `ddp_comm_hook`",
                cure="DDPStrategy(ddp_comm_hook=None)",
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_products": []}


def _future(device: torch.device) -> torch.futures.Future[Tensor]:
    # One that knows of the device makes those who wait wait for its stream.
    devices: list[int | str | torch.device] | None = [device] if device.type == "cuda" else None
    return torch.futures.Future(devices=devices)


__all__ = ["GradientAggregation"]
