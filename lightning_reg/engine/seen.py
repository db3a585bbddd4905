"""What a step has seen, to look into and to speak of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning_reg.engine.step import Step


class Features(Mapping[str, Tensor]):
    """Outputs of layers by name."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __getitem__(self, layer: str) -> Tensor:
        return self._step.feature(layer)

    def __iter__(self) -> Any:
        return iter(self._step.records)

    def __len__(self) -> int:
        return len(self._step.records)


def kind_of(value: Any) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {kind_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


__all__ = ["Features", "kind_of"]
