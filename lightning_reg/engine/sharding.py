"""Weights that FSDP2 shards over ranks: whole where mathematics needs it, else this rank's part.

Sharded weights are DTensors. What is separable (a mask, a pull to a reference) is computed on the
parts; what is not (a norm, a Gram matrix) on whole tensors, which all ranks gather together and
from which each takes its part of the result. Plain tensors pass through every function as they
are, at no cost.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


def _dtensors() -> Any:
    """Where DTensor is: torch 2.5 made it public; builds without distributed have none."""
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):
        with suppress(ImportError):
            module = importlib.import_module(name)
            if hasattr(module, "DTensor"):
                return module
    return None


_DTENSORS = _dtensors()

# Numbers in the weights of one group: 256 MiB in float32, so that a penalty does not undo what
# sharding saves.
LARGEST_GROUP = 2**26


def shards_weights(trainer: Any) -> bool:
    """Whether the strategy is the one under which modules shard their weights (FSDP2)."""
    return "ModelParallel" in type(trainer.strategy).__name__


def is_sharded(tensor: Any) -> bool:
    """Whether this rank holds a part of ``tensor`` only."""
    return _DTENSORS is not None and isinstance(tensor, _DTENSORS.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on all ranks; a gradient flows back to its parts.

    Gradients are taken as equal on all ranks, as they are of what is computed from whole weights.
    """
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def wholes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`whole` of each."""
    return [whole(tensor) for tensor in tensors]


def gathered_together(weights: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Weights in groups that may be whole at the same time; all, unless they are sharded."""
    group: dict[str, nn.Parameter] = {}
    size = 0
    for name, weight in weights.items():
        if group and is_sharded(weight) and size + weight.numel() > LARGEST_GROUP:
            yield group
            group, size = {}, 0
        group[name] = weight
        size += weight.numel()
    if group:
        yield group


def part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; shares its memory, and no gradient flows."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        own: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return own


def parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`part` of each."""
    return [part(tensor) for tensor in tensors]


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, sharded as ``like`` is; without communication."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    everywhere = [_DTENSORS.Replicate()] * mesh.ndim
    replicas = _DTENSORS.DTensor.from_local(tensor, mesh, everywhere, run_check=False)
    sharded: Tensor = replicas.redistribute(placements=like.placements)  # type: ignore[attr-defined]
    return sharded


def with_parts(own: Tensor, like: Tensor) -> Tensor:
    """A sharded tensor in the layout of ``like``, of which this rank holds ``own``."""
    if not is_sharded(like):
        return own
    layout: Any = like
    made: Tensor = _DTENSORS.DTensor.from_local(
        own,
        layout.device_mesh,
        layout.placements,
        run_check=False,
        shape=layout.shape,
        stride=layout.stride(),
    )
    return made


def own_parts(tensors: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each whole tensor, in the layout of its partner."""
    return [part(shard_like(t, like)) for t, like in zip(tensors, likes, strict=True)]


def write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy whole values into tensors that may be sharded."""
    with torch.no_grad():
        torch._foreach_copy_(parts(targets), own_parts(values, targets))


def gather_weights(module: nn.Module) -> None:
    """Make the module hold its whole weights until it puts them away by itself."""
    for submodule in _fsdp_modules(module):
        submodule.unshard()


def put_weights_away(module: nn.Module) -> None:
    """Drop whole weights that the module gathered: the next pass gathers those of then."""
    for submodule in _fsdp_modules(module):
        submodule.reshard()


def gradients_of(
    loss: Tensor, weights: Sequence[Tensor], *, retain_graph: bool = False
) -> list[Tensor | None]:
    """Gradients by weights, ``None`` where the loss does not reach; ``.grad`` stays as it is.

    Those by sharded weights are the mean over ranks already. FSDP2 leaves ``autograd.grad``
    nothing to differentiate by, since the weights that took part are whole ones, which exist
    during a pass only: there they are taken out of a real backward.
    """
    if not any(is_sharded(weight) for weight in weights):
        return list(
            torch.autograd.grad(loss, weights, retain_graph=retain_graph, allow_unused=True)
        )
    with _without_gradients(weights):
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        return [weight.grad for weight in weights]


@contextmanager
def _without_gradients(weights: Sequence[Tensor]) -> Iterator[None]:
    kept = [weight.grad for weight in weights]
    try:
        for weight in weights:
            weight.grad = None
        yield
    finally:
        for weight, gradient in zip(weights, kept, strict=True):
            weight.grad = gradient


def _fsdp_modules(module: nn.Module) -> list[Any]:
    # By behaviour: the class has moved between versions of torch.
    return [m for m in module.modules() if hasattr(m, "reshard") and hasattr(m, "unshard")]


__all__ = [
    "gather_weights",
    "gathered_together",
    "gradients_of",
    "is_sharded",
    "own_parts",
    "part",
    "parts",
    "put_weights_away",
    "shard_like",
    "shards_weights",
    "whole",
    "wholes",
    "with_parts",
    "write",
]
