"""Worst-group accuracy on coloured digits: plain training against techniques for groups.

Run ``python examples/benchmarks/worst_group.py [seeds]``: a small network on digits whose colour
agrees with the label in 90 % of the training set and in half of the held-out one. For each
technique the accuracy on the worst of the four groups (label x colour) and on all held-out
samples, as mean and standard deviation over seeds. A few seconds.
"""

from __future__ import annotations

import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_reg import GroupDRO, KLRobustReweighting, Signals, WorstGroupLoss
from lightning_reg.compare.coloured import GROUPS, coloured_digits

SIGNALS = Signals(domain="batch.2")
TECHNIQUES: dict[str, Callable[[], list[Callback]]] = {
    "plain": list,
    "GroupDRO": lambda: [GroupDRO(num_groups=GROUPS, step_size=0.05, signals=SIGNALS)],
    # Knows no groups: it only sees which samples have a large loss.
    "KLRobustReweighting": lambda: [KLRobustReweighting(lam=1.0)],
    "WorstGroupLoss": lambda: [WorstGroupLoss(num_groups=GROUPS, signals=SIGNALS)],
}


class Net(L.LightningModule):
    """Two layers on a digit in two colour channels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy; the groups are for the techniques."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum and weight decay."""
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)


def accuracies(callbacks: Sequence[Callback], seed: int, epochs: int = 40) -> tuple[float, float]:
    """Held-out accuracy on the worst group, and on all samples, after one training run."""
    training, held_out = coloured_digits(seed)
    torch.manual_seed(seed)
    module = Net()
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1_000,
    )
    order = torch.Generator().manual_seed(seed)
    trainer.fit(module, DataLoader(training, 64, shuffle=True, generator=order))
    inputs, labels, groups = held_out.tensors
    with torch.no_grad():
        right = (module(inputs).argmax(1) == labels).float()
    return min(float(right[groups == g].mean()) for g in range(GROUPS)), float(right.mean())


def main(seeds: int = 5) -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    table = Table(title=f"Coloured digits, mean ± standard deviation over {seeds} seeds")
    for column in ("technique", "worst group", "all samples"):
        table.add_column(column, justify="left" if column == "technique" else "right")
    for name, make in TECHNIQUES.items():
        found = [accuracies(make(), seed) for seed in range(seeds)]
        table.add_row(name, *(_summary(values) for values in zip(*found, strict=True)))
    Console().print(table)


def _summary(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
