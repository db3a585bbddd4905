"""Finds out that replicas have drifted apart, where, and who wrote there last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import RegularizationError
from lightning_reg.engine.regularizer import Regularizer

if TYPE_CHECKING:
    import lightning.pytorch as pl

# What normalization layers, also those of a teacher, gather from their own rank's batches.
_RUNNING = ("running_mean", "running_var")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(RegularizationError):
    """What has to be the same on every rank is not."""


class WriteLedger:
    """Remembers which technique last wrote each parameter, or its gradient.

    Writes show in the version counters of tensors, so that nothing is copied or compared.

    Args:
        module: whose parameters are watched.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters())
        self._writers: dict[str, str] = {}

    @contextmanager
    def writing(self, technique: Regularizer) -> Iterator[None]:
        """Whatever changes within the context is written by ``technique``."""
        before = self._versions()
        yield
        label = f"{type(technique).__name__} (reg/{technique.name})"
        for name, old, new in zip(self._parameters, before, self._versions(), strict=True):
            if old[0] != new[0]:
                self._writers[name] = label
            elif old[1] != new[1]:
                self._writers[name] = f"{label}, through its gradient"

    def writer(self, name: str) -> str | None:
        """Which technique last wrote the parameter or its gradient, if one did."""
        return self._writers.get(name)

    def _versions(self) -> list[tuple[int, int]]:
        return [
            (p._version, -1 if p.grad is None else p.grad._version)
            for p in self._parameters.values()
        ]


class ReplicaGuard:
    """Compares checksums of everything that replicas have to share; one small reduction.

    Compared are all parameters; the buffers of parametrizations and boolean buffers, which are
    masks; and the tensors in the ``state_dict`` of techniques that are not local to a rank. Other
    buffers (running statistics) follow each rank's batches until DDP's next broadcast. What DDP was
    told to ignore is each rank's own.

    Args:
        module: the module without its DDP wrapper.
        techniques: the techniques of the Trainer.
        comm: the ranks.
    """

    def __init__(
        self, module: nn.Module, techniques: Iterable[Regularizer], comm: Communicator
    ) -> None:
        self.module = module
        self.techniques = list(techniques)
        self.comm = comm
        self.ledger = WriteLedger(module)

    def check(self, global_step: int) -> None:
        """Compare now; every rank comes to the same result.

        Args:
            global_step: the number of optimizer steps done, for the message.

        Raises:
            ReplicaError: on every rank, if anything differs.
        """
        named = list(self._shared())
        sums = torch.stack([checksum(tensor) for _, tensor in named])
        # ~x turns the minimum into a maximum without overflow: one reduction for both.
        most, least = self.comm.reduce(torch.cat([sums, ~sums]), "max").chunk(2)
        differs = (most != ~least).nonzero().flatten().tolist()
        if differs:
            raise self._error([named[i][0] for i in differs], global_step)

    def _shared(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, in an order that all ranks agree on."""
        ignored = set(getattr(self.module, "_ddp_params_and_buffers_to_ignore", ()))
        for name, parameter in self.module.named_parameters():
            if name not in ignored:
                yield f"parameter {name!r}", parameter.detach()
        for name, buffer in self.module.named_buffers():
            is_shared = buffer.dtype == torch.bool or ".parametrizations." in f".{name}"
            if is_shared and name not in ignored:
                yield f"buffer {name!r}", buffer
        device = next(self.module.parameters()).device
        for technique in self.techniques:
            if technique.semantics != "local":
                for path, tensor in _tensors(technique.state_dict(), "state"):
                    if not any(name in path for name in _RUNNING):
                        yield f"{technique.state_key}.{path}", tensor.to(device)

    def _error(self, names: list[str], global_step: int) -> ReplicaError:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return ReplicaError(
            "RegularizedDDPStrategy",
            f"the replicas differ after {global_step} steps, first in {names[0]}{others}; "
            f"{self._blame(names[0])}. Going on would average models that are not the same",
            cure="draw noise on weights with `step.rng(self, shared=True)`, and reduce over ranks "
            "with `step.comm` whatever you write to weights",
        )

    def _blame(self, name: str) -> str:
        kind, _, quoted = name.partition(" ")
        if kind == "buffer":
            return "the technique that made this mask or parametrization wrote it"
        if kind != "parameter":
            return "that technique wrote it"
        writer = self.ledger.writer(quoted.strip("'"))
        if writer is None:
            return "no technique wrote it, so look at your own hooks and optimizer"
        return f"the technique that last wrote it is {writer}"


def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit sum over the bit patterns of ``tensor``, rows weighted by their position.

    Equal tensors have equal sums on every machine; one changed bit or two exchanged rows change
    it. No copy of the tensor is made.

    Args:
        tensor: of any shape and dtype.

    Returns:
        An int64 tensor without dimensions, on the tensor's device.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    bits = tensor.view(_BITS[tensor.element_size()]) if tensor.ndim else tensor.reshape(1)
    bits = bits.view(_BITS[bits.element_size()])
    rows = bits if bits.ndim == 1 else bits.sum(tuple(range(1, bits.ndim)), dtype=torch.int64)
    weights = 2 * torch.arange(len(rows), device=tensor.device) + 1
    return (rows * weights).sum()


def _tensors(state: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield path, state.detach()
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from _tensors(state[key], f"{path}[{key!r}]")
    elif isinstance(state, (list, tuple)):
        for index, item in enumerate(state):
            yield from _tensors(item, f"{path}[{index}]")


def techniques_of(trainer: pl.Trainer) -> list[Regularizer]:
    """The techniques of a Trainer, in an order that does not depend on the callbacks list."""
    found = [c for c in trainer.callbacks if isinstance(c, Regularizer)]  # type: ignore[attr-defined]
    return sorted(found, key=lambda technique: technique.state_key)


__all__ = ["ReplicaError", "ReplicaGuard", "WriteLedger", "checksum", "techniques_of"]
