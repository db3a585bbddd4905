"""What a module is at a moment, and how two moments differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from inspect import isroutine
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REGISTERS = ("_parameters", "_buffers", "_modules")
_PRIMITIVES = (bool, int, float, complex, str, bytes, type(None))


def copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Detached copies of named tensors."""
    return {name: tensor.detach().clone() for name, tensor in named}


def tensors_of(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in nested dicts and sequences, by its path."""
    if isinstance(tree, Tensor):
        return {path: tree}
    return _walk(tree, path, tensors_of)


def numbers_of(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Every floating-point tensor and float in nested dicts and sequences, by its path."""
    if isinstance(tree, Tensor):
        return {path: tree} if tree.is_floating_point() else {}
    if isinstance(tree, float):
        return {path: torch.tensor(tree, dtype=torch.float64)}
    return _walk(tree, path, numbers_of)


def effective_weights(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """What layers compute with: through parametrizations where there are some."""
    found = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        value = getattr(module.get_submodule(owner), attribute, None)
        if isinstance(value, Tensor):
            found[name] = value.detach().clone()
    return found


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Classes, attributes, registered names, flags and hooks of a module and all submodules."""
    taken: dict[str, Any] = {}
    for path, part in module.named_modules():
        where = f"{path}." if path else ""
        taken[f"{where}__class__"] = type(part)
        for name, value in vars(part).items():
            if name in _HOOKS:
                taken[f"{where}{name}"] = tuple(value.values())
            elif name in _REGISTERS:
                taken[f"{where}{name}"] = tuple(value)
            else:
                taken[f"{where}{name}"] = value
    for name, parameter in module.named_parameters():
        kind = (tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
        taken[f"{name} (shape, dtype, requires_grad)"] = kind
    return taken


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two snapshots, with a description: identity for objects."""
    found = {}
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            found[key] = "is gone"
        elif key not in before:
            found[key] = f"is new: {_short(after[key])}"
        elif not _same(before[key], after[key]):
            found[key] = f"was {_short(before[key])} and is {_short(after[key])}"
    return found


def equal(one: Any, other: Any) -> bool:
    """Deep equality that tensors, containers and plain objects take part in."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return same_bits(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, float) and one != one:
        return bool(other != other)
    if isinstance(one, nn.Module):
        return equal(dict(one.state_dict()), dict(other.state_dict()))
    attributes = getattr(one, "__dict__", None)
    known = isinstance(one, (*_PRIMITIVES, set, frozenset, type)) or is_dataclass(one)
    # Nothing among the attributes of a function, or of a partial one, says what it does.
    opaque = isroutine(one) or (callable(one) and not attributes)
    if known or opaque or attributes is None:
        return bool(one == other)
    return equal(attributes, other.__dict__)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in every bit that matters: a NaN equals a NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    both_nan = one.isnan() & other.isnan()
    return bool(((one == other) | both_nan).all())


def first_difference(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str] | None = None
) -> str | None:
    """A sentence about the first tensor that is not bit-equal; ``None`` if all are."""
    for name in names if names is not None else sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            return f"{name} exists in one of them only"
        if not same_bits(one[name], other[name]):
            return f"{name} {gap(one[name], other[name])}"
    return None


def gap(one: Tensor, other: Tensor) -> str:
    """How far two tensors are apart, in words."""
    if one.shape != other.shape:
        return f"has shape {tuple(one.shape)} against {tuple(other.shape)}"
    if one.dtype != other.dtype:
        return f"has type {one.dtype} against {other.dtype}"
    distance = float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    return f"differs by up to {distance:.3g}"


def largest_gap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest absolute difference of floating-point tensors, over the largest number.

    Returns:
        The relative difference and the name of the tensor in which it is; infinity where a
        tensor is missing, has another shape or holds a NaN.
    """
    worst, where, largest = 0.0, "", 1e-12
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or one[name].shape != other[name].shape:
            return float("inf"), name
        if not one[name].is_floating_point() or one[name].numel() == 0:
            continue
        a, b = one[name].double(), other[name].double()
        distance = float((a - b).abs().max())
        if distance != distance:
            return float("inf"), name
        largest = max(largest, float(a.abs().max()))
        if distance > worst:
            worst, where = distance, name
    return worst / largest, where


def _walk(tree: Any, path: str, visit: Any) -> dict[str, Tensor]:
    pairs: Any = ()
    if isinstance(tree, Mapping):
        pairs = tree.items()
    elif isinstance(tree, (list, tuple)):
        pairs = enumerate(tree)
    found: dict[str, Tensor] = {}
    for key, value in pairs:
        found |= visit(value, f"{path}.{key}" if path else str(key))
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, _PRIMITIVES):
        return type(one) is type(other) and bool(one == other or (one != one and other != other))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, torch.dtype) and one == other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
