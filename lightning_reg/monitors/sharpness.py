"""Tracks how sharp the minimum is that a network trains into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import ArgumentError, UnsupportedError
from lightning_reg.engine.memory import take_index
from lightning_reg.engine.outputs import loss_of
from lightning_reg.engine.random import rng_state
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.rerun import replayed_rng, without_trace
from lightning_reg.engine.sharding import shards_weights
from lightning_reg.metrics.hessian import (
    Distribution,
    check_lanczos,
    check_probes,
    hessian_eigenvalues,
    hessian_trace,
)
from lightning_reg.monitors.joint_log import log_joint

__all__ = ["SharpnessMonitor"]

Data = Literal["val", "train"]


class SharpnessMonitor(Callback):
    """Logs trace and top eigenvalue of the Hessian of the loss at each validation.

    ``val/hessian_trace``, ``val/hessian_trace_error`` (its standard error) and
    ``val/hessian_top_eigenvalue`` reach the loggers and ``trainer.callback_metrics``
    (``train/...`` for ``data="train"``). The loss is that of the user's own ``training_step``, in
    eval mode and without the techniques of the run, on the first batches of the validation set,
    or of each training epoch.

    Args:
        batches: how many batches of each rank; the same ones at every validation, if the
            validation set is not shuffled.
        probes: random vectors for the trace; 0 leaves it out.
        distribution: of their entries: ``"rademacher"`` or ``"gaussian"``.
        k: how many of the largest eigenvalues (``..._2``, ``..._3``); 0 leaves them out.
        iterations: products with the Hessian at most, for the eigenvalues.
        tolerance: of the eigenvalues, relative to the largest magnitude.
        data: ``"val"`` or ``"train"``.
        every_n_epochs: measure at each n-th epoch's validation.
        loss: ``loss(module, batch)``, the mean loss of a batch; default: ``training_step``.
        seed: of the random vectors, the same at every validation.

    Attributes:
        results: the latest value of each log key.

    Raises:
        ArgumentError: if an argument is outside its range.
        UnsupportedError: where FSDP2 shards weights; without ``loss`` where the module optimizes
            manually.

    Note:
        Exact over ranks: each product with the Hessian is the mean over all ranks' samples, and
        all ranks draw the same vectors. What a DistributedSampler repeats counts twice. Costs
        ``batches * (probes + iterations)`` Hessian-vector products of about two backward passes
        at most, the memory of ``iterations`` copies of the parameters, and for several batches as
        many forward passes again. Random state, metrics, logs and BatchNorm do not notice.

    Example:
        >>> from lightning_reg import SharpnessMonitor
        >>> callbacks = [SharpnessMonitor(batches=1, probes=20)]
    """

    def __init__(
        self,
        batches: int = 1,
        *,
        probes: int = 30,
        distribution: Distribution = "rademacher",
        k: int = 1,
        iterations: int = 30,
        tolerance: float = 1e-3,
        data: Data = "val",
        every_n_epochs: int = 1,
        loss: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("batches", batches, 1),
            ("probes", probes, 0),
            ("k", k, 0),
            ("every_n_epochs", every_n_epochs, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ArgumentError(
                    self,
                    f"`{name}` must be a whole number from {low}, got {value!r}",
                    cure=f"SharpnessMonitor({name}={max(low, 1)})",
                )
        if data not in ("val", "train"):
            raise ArgumentError(
                self,
                f"`data` must be one of val, train, got {data!r}",
                cure='SharpnessMonitor(data="val")',
            )
        check_probes(max(probes, 1), distribution)
        check_lanczos(max(k, 1), "largest", iterations, tolerance)
        self.batches, self.probes, self.distribution = batches, probes, distribution
        self.k, self.iterations, self.tolerance = k, iterations, tolerance
        self.data, self.every_n_epochs, self.seed = data, every_n_epochs, seed
        self.loss = loss
        self.results: dict[str, float] = {}
        self._kept: list[Any] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a run in which the loss cannot be differentiated twice."""
        if shards_weights(trainer):
            raise UnsupportedError(
                self, "differentiates twice by whole weights, which FSDP2 shards over ranks"
            )
        if self.loss is None and not pl_module.automatic_optimization:
            raise UnsupportedError(
                self,
                "takes the loss from training_step, which optimizes by itself here",
                cure="SharpnessMonitor(loss=lambda module, batch: module.loss_of(batch))",
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training batches are taken anew."""
        if self.data == "train":
            self._kept = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep a training batch."""
        if self.data == "train":
            self._keep(batch)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation batches are taken anew."""
        if self.data == "val":
            self._kept = []

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch of the first validation set."""
        if self.data == "val" and dataloader_idx == 0:
            self._keep(batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log."""
        skipped = trainer.training and trainer.current_epoch % self.every_n_epochs
        comm = Communicator.of(trainer)
        # All ranks measure, or none does: a rank may have no batch.
        if trainer.sanity_checking or skipped or comm.any(not self._kept):
            return
        found = self._measure(trainer, pl_module, comm)
        for name, value in found.items():
            key = f"{self.data}/{name}"
            self.results[key] = float(value)
            log_joint(pl_module, key, value.to(pl_module.device))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Free the batches."""
        if self.data == "val":
            self._kept = []

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Free the batches."""
        self._kept = []

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the batches."""
        self._kept = []

    # ------------------------------------------------------------------ internals

    def _keep(self, batch: Any) -> None:
        if len(self._kept) < self.batches:
            self._kept.append(take_index(batch)[0])

    def _measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, comm: Communicator
    ) -> dict[str, Tensor]:
        parameters = [p for p in module.parameters() if p.requires_grad]
        with _with_gradients():
            # Made in inference mode, a batch could not take part in a backward.
            batches = [_copied(batch) for batch in self._kept]
            losses = [_Loss(self, trainer, module, batch) for batch in batches]
            settings: dict[str, Any] = {
                "weights": [float(_size(batch)) for batch in batches],
                "seed": self.seed,
                "comm": comm,
            }
            found: dict[str, Tensor] = {}
            if self.probes:
                value, error = hessian_trace(
                    losses,
                    parameters,
                    probes=self.probes,
                    distribution=self.distribution,
                    **settings,
                )
                found |= {"hessian_trace": value, "hessian_trace_error": error}
            if self.k:
                top = hessian_eigenvalues(
                    losses,
                    parameters,
                    self.k,
                    iterations=self.iterations,
                    tolerance=self.tolerance,
                    **settings,
                ).values
                names = ["hessian_top_eigenvalue"]
                names += [f"hessian_top_eigenvalue_{i}" for i in range(2, self.k + 1)]
                found |= dict(zip(names, top, strict=False))
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Batches belong to a run that is under way.
        return {**self.__dict__, "_kept": []}


class _Loss:
    """The loss of one batch, which leaves no trace; see :class:`SharpnessMonitor`."""

    def __init__(
        self, monitor: SharpnessMonitor, trainer: pl.Trainer, module: pl.LightningModule, batch: Any
    ) -> None:
        self._monitor, self._module, self._batch = monitor, module, batch
        self._step = _users_step(trainer, module)

    def __call__(self) -> Tensor:
        """Evaluate."""
        module, devices = self._module, []
        if module.device.type == "cuda":
            devices = [module.device]
        with without_trace(module), replayed_rng(rng_state(devices), devices):
            if self._monitor.loss is not None:
                return self._monitor.loss(module, self._batch)
            loss = loss_of(self._step(self._batch))
        if loss is None:
            raise UnsupportedError(
                self._monitor,
                "takes the loss from training_step, which returned none for a batch of the "
                "validation set",
                cure="SharpnessMonitor(loss=lambda module, batch: module.loss_of(batch))",
            )
        return loss


def _users_step(trainer: pl.Trainer, module: pl.LightningModule) -> Callable[[Any], Any]:
    """The user's own training step, without any technique."""
    callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    pipelines = [c.pipeline for c in callbacks if isinstance(c, Regularizer)]
    found = [p.users_step for p in pipelines if p is not None]
    step = found[0] if found else module.training_step
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        return lambda batch: step(batch, 0)
    return step


def _size(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return 1


def _copied(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, Tensor.clone)


@contextmanager
def _with_gradients() -> Iterator[None]:
    """Out of inference mode, with gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
