"""BatchNorm's statistics for weights that no training step has seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.memory import take_index
from lightning_reg.engine.random import rng_state
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.rerun import replayed_rng, without_trace
from lightning_reg.mechanisms.training_share import TrainingShare


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that keep statistics, by name."""
    found = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
    }
    return {name: part for name, part in found.items() if part.running_mean is not None}


def fresh_statistics(
    owner: Regularizer, trainer: pl.Trainer, module: pl.LightningModule, comm: Communicator
) -> None:
    """Replace BatchNorm's statistics by the averages over one pass through the training data.

    Mean and (unbiased) variance of each batch are averaged with the number of its samples as
    weight, in float64, over the batches of all ranks. That is what ``torch.optim.swa_utils``
    computes on one process with batches of one size. Samples are dealt to ranks without
    repeating any. The user's training step runs in train mode; logs, metrics, other buffers and
    random numbers do not notice.

    Raises:
        UnsupportedError: if the training data cannot be gone through a second time.
    """
    norms = batch_norms(module)
    device = module.device
    devices = [device] if device.type == "cuda" else []
    step = _users_step(owner, module)
    totals = _Totals(norms)
    modes = {part: part.training for part in module.modules()}
    with replayed_rng(rng_state(devices), devices):
        try:
            module.train()
            for batch in _batches(owner, trainer, comm):
                moved = take_index(trainer.strategy.batch_to_device(batch))[0]
                context = trainer.precision_plugin.forward_context()
                with without_trace(module), totals, torch.no_grad(), context:
                    step(moved)
        finally:
            for part, training in modes.items():
                part.training = training
    totals.write(comm)


class _Totals:
    """Weighted sums of the statistics of each layer's inputs."""

    def __init__(self, norms: dict[str, nn.Module]) -> None:
        self._norms = list(norms.values())
        self._sums = {id(n): _zeros(n) for n in self._norms}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._handles = [n.register_forward_pre_hook(self._note) for n in self._norms]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        dims = [0, *range(2, x.ndim)]
        variance, mean = torch.var_mean(x, dims, correction=1 if x.numel() > x.shape[1] else 0)
        sums = self._sums[id(norm)]
        sums[0] += len(x) * mean.to(sums)
        sums[1] += len(x) * variance.to(sums)
        sums[2] += len(x)

    def write(self, comm: Communicator) -> None:
        """Write the averages over all ranks: one collective."""
        flat = comm.reduce(torch.cat([self._sums[id(n)].reshape(-1) for n in self._norms]))
        parts = flat.split([self._sums[id(n)].numel() for n in self._norms])
        with torch.no_grad():
            for norm, part in zip(self._norms, parts, strict=True):
                mean, variance, count = part.view(3, -1)
                # A layer that training does not call keeps what it has.
                called = count > 0
                for buffer, total in ((norm.running_mean, mean), (norm.running_var, variance)):
                    new = (total / count.clamp_min(1)).to(buffer)  # type: ignore[arg-type]
                    buffer.copy_(torch.where(called, new, buffer))  # type: ignore[operator, arg-type]


def _zeros(norm: nn.Module) -> Tensor:
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    # MPS has no float64.
    kind = torch.float32 if mean.device.type == "mps" else torch.float64
    return torch.zeros(3, len(mean), dtype=kind, device=mean.device)


def _users_step(owner: Regularizer, module: pl.LightningModule) -> Any:
    step = module.training_step if owner.pipeline is None else owner.pipeline.users_step
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return (lambda batch: step(batch, 0)) if takes_index else step


def _batches(owner: Regularizer, trainer: pl.Trainer, comm: Communicator) -> Iterator[Any]:
    """This rank's share of the training set, in order; the run's own loader is not touched."""
    share = TrainingShare(
        owner,
        trainer,
        comm,
        why="takes BatchNorm's statistics anew",
        cure=f'{type(owner).__name__}(statistics="average")',
    )
    # Layers that talk to other ranks need as many batches on each.
    joint = any(isinstance(m, nn.SyncBatchNorm) for m in trainer.lightning_module.modules())
    for index, batch in enumerate(share):
        if joint and index >= share.fewest:
            return
        yield batch


__all__ = ["batch_norms", "fresh_statistics"]
