"""The values of all techniques on their way to the Trainer's log."""

from __future__ import annotations

from collections import defaultdict

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.communicator import Communicator


class ValueLog:
    """Collects ``reg/<name>`` over the micro-batches of an optimizer step."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = defaultdict(list)

    def collect(self, name: str, value: Tensor | float, suffix: str = "") -> None:
        """Keep a value under ``reg/<name>`` or ``reg/<name>_<suffix>``."""
        key = f"reg/{name}" + (f"_{suffix}" if suffix else "")
        self._values[key].append(value.detach() if isinstance(value, Tensor) else float(value))

    def flush(self, module: pl.LightningModule, comm: Communicator) -> None:
        """Log the means over micro-batches and ranks: one collective for all values."""
        if not self._values:
            return
        keys = sorted(self._values)
        means = comm.reduce(
            torch.stack([_mean(self._values[key], module.device) for key in keys]), "mean"
        )
        self._values.clear()
        for key, value in zip(keys, means.unbind(), strict=True):
            module.log(key, value, on_step=True, on_epoch=False)


def _mean(values: list[Tensor | float], device: torch.device) -> Tensor:
    return torch.stack(
        [torch.as_tensor(v, device=device).float().reshape(()) for v in values]
    ).mean()
