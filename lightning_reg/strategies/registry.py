"""Makes ``Trainer(strategy="ddp_reg")`` work, in Trainers of both import names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.multiprocessing

NAME = "ddp_reg"
# Each package refuses the other's strategies, so each has a class of its own.
_CLASSES = {
    "lightning.pytorch": "lightning_reg.strategies.ddp_reg",
    "pytorch_lightning": "lightning_reg.strategies.ddp_reg_pytorch_lightning",
}


def register() -> None:
    """Register ``ddp_reg`` and its variants; safe to call again.

    ``import lightning_reg`` calls this. The standalone ``pytorch_lightning`` is only served if it
    was imported before, since importing it here would cost seconds: a program that imports it
    later calls this once more.
    """
    importlib.import_module("lightning.pytorch.strategies")
    for package, home in _CLASSES.items():
        strategies = sys.modules.get(f"{package}.strategies")
        if strategies is not None:
            _add(strategies.StrategyRegistry, partial(_build, home))


def _add(registry: Any, build: Callable[..., Any]) -> None:
    for name, description, settings in _variants():
        # The class is imported when a Trainer asks for it; a registry only calls what it holds.
        registry.register(name, build, description=description, override=True, **settings)


def _build(home: str, **settings: Any) -> Any:
    return importlib.import_module(home).RegularizedDDPStrategy(**settings)


def _variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Names, descriptions and settings, after those that Lightning has for ``ddp``."""
    available = torch.multiprocessing.get_all_start_methods()
    launchers = (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork"))
    for suffix, start in launchers:
        if start != "popen" and start not in available:
            continue
        base = NAME + suffix
        yield base, f"RegularizedDDPStrategy, processes by {start}", {"start_method": start}
        for flag in (False, True):
            yield (
                f"{base}_find_unused_parameters_{str(flag).lower()}",
                f"RegularizedDDPStrategy, find_unused_parameters={flag}, processes by {start}",
                {"start_method": start, "find_unused_parameters": flag},
            )
    yield (
        f"{NAME}_static_graph",
        "RegularizedDDPStrategy, static_graph=True",
        {"static_graph": True},
    )


__all__ = ["NAME", "register"]
