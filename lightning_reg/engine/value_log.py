"""The values of all techniques on their way to the Trainer's log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine.communicator import Communicator


class ValueLog:
    """Collects ``reg/<name>`` over the micro-batches of an optimizer step.

    A value that differs between ranks waits for the next collective that is made anyway
    (:meth:`waiting`, :meth:`arrived`); :meth:`flush` makes one for those that are left.
    """

    def __init__(self) -> None:
        self._joint: dict[str, list[Tensor | float]] = defaultdict(list)
        self._own: list[tuple[str, Tensor | float]] = []

    def collect(
        self, name: str, value: Tensor | float, suffix: str = "", *, joint: bool = False
    ) -> None:
        """Keep a value under ``reg/<name>`` or ``reg/<name>_<suffix>``.

        Args:
            name: of the technique.
            value: of this rank, or of all.
            suffix: of the key.
            joint: whether it is the same on all ranks.
        """
        key = f"reg/{name}" + (f"_{suffix}" if suffix else "")
        kept = value.detach() if isinstance(value, Tensor) else float(value)
        if joint:
            self._joint[key].append(kept)
        else:
            self._own.append((key, kept))

    def waiting(self, device: torch.device) -> list[Tensor]:
        """This rank's values whose mean over ranks is not known yet, as scalars."""
        values = [torch.as_tensor(value, device=device) for _, value in self._own]
        return [value.float().reshape(()) for value in values]

    def arrived(self, means: Sequence[Tensor]) -> None:
        """Take the means over ranks of what was :meth:`waiting`."""
        for (key, _), mean in zip(self._own, means, strict=True):
            self._joint[key].append(mean.detach())
        self._own = []

    def flush(self, module: pl.LightningModule, comm: Communicator) -> None:
        """Log the means over micro-batches and ranks."""
        if self._own:
            own = torch.stack(self.waiting(module.device))
            self.arrived(comm.reduce(own, "mean").unbind())
        for key in sorted(self._joint):
            module.log(key, _mean(self._joint[key], module.device), on_step=True, on_epoch=False)
        self._joint.clear()


def _mean(values: list[Tensor | float], device: torch.device) -> Tensor:
    return torch.stack(
        [torch.as_tensor(v, device=device).float().reshape(()) for v in values]
    ).mean()
