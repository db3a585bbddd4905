"""The strategy ``ddp_reg``: DDP that splits penalties over ranks and guards the replicas."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_reg.strategies.ddp_reg import RegularizedDDPStrategy
    from lightning_reg.strategies.guard import ReplicaError

_HOMES = {"RegularizedDDPStrategy": "ddp_reg", "ReplicaError": "guard"}

__all__ = ["RegularizedDDPStrategy", "ReplicaError"]


def __getattr__(name: str) -> Any:
    # `import lightning_reg` imports this package for its registry and nothing else.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
