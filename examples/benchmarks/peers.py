"""What stands beside a technique in a benchmark: a step written by hand, a library's callback."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from timing import ratios
from torch import Tensor

Loop = Callable[[Any, Tensor, Tensor], Tensor]
Make = Callable[[], list[Callback]]


class ByHand(Callback):
    """Puts a loop in place of the training step.

    Args:
        loop: the loss, from the module, inputs and targets.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Bind the loop to the module."""

        def training_step(module: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return self._loop(module, *batch)

        pl_module.training_step = MethodType(training_step, pl_module)  # type: ignore[method-assign]


def by_hand(loop: Loop) -> Make:
    """Makes the callbacks that train with a loop."""
    return lambda: [ByHand(loop)]


def optional(name: str) -> Any:
    """A module, or None, with a message, where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        print(f"left out: {name} ({error})\n")
        return None


def variants(rows: Mapping[str, Mapping[str, Make]]) -> dict[str, Make]:
    """The plain step and all cells of the rows, for one run."""
    found: dict[str, Make] = {"plain": list}
    for technique, cells in rows.items():
        for column, make in cells.items():
            found[f"{technique}/{column}"] = make
    return found


def print_table(
    title: str, times: Mapping[str, list[float]], rows: Iterable[str], columns: Iterable[str]
) -> None:
    """Ratios to the plain step in Markdown, a technique a row."""
    columns, found = list(columns), ratios(times, "plain")
    print(f"| {title} | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for technique in rows:
        cells = [found.get(f"{technique}/{column}") for column in columns]
        shown = ["–" if c is None else f"{c[0]:.2f} ± {c[1]:.2f}" for c in cells]
        print(f"| `{technique}` | {' | '.join(shown)} |", flush=True)
    print()
