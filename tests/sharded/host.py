"""Hosts of the contract whose weights FSDP2 splits over ranks, and the runs that compare them."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Sharded:
    """Splits the children of a module, and the module itself, over the data-parallel ranks."""

    def configure_model(self):
        """Once: Lightning may call it again."""
        if any(isinstance(p, DTensor) for p in self.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for part in self.children():
            if next(part.parameters(), None) is not None:
                fully_shard(part, mesh=mesh)
        fully_shard(self, mesh=mesh)


def sharded(module):
    """The same module, to be split."""
    base = type(module)
    module.__class__ = type(base.__name__, (Sharded, base), {})
    return module


def strategy(**settings):
    """Pure data parallelism over both ranks."""
    return ModelParallelStrategy(
        **{"data_parallel_size": torch.distributed.get_world_size(), "tensor_parallel_size": 1}
        | settings
    )


def whole_weights(module):
    """Every parameter as one process would hold it."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }
