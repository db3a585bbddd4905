"""Step times measured side by side: every ratio comes from interleaved rounds of one run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class SmallConvnet(L.LightningModule):
    """Three convolutions and a head on 32 x 32 images, 10 classes (100 k parameters)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128)
        blocks = [
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in itertools.pairwise(widths)
        ]
        self.encoder = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        logits: Tensor = self.head(self.dropout(self.encoder(x)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class StepTimes(Callback):
    """The CPU time of each training step, from batch to batch: other processes do not count.

    Args:
        steps: after which the run stops; optimizers that Lightning does not see step by
            themselves, and ``max_steps`` never comes.
    """

    def __init__(self, steps: int | None = None) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None
        self._steps = steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start anew."""
        self._last = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """One more step."""
        now = time.process_time()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now
        if len(self.seconds) + 1 == self._steps:
            trainer.should_stop = True


def images(count: int, wrap: Callable[[Any], Any] | None = None) -> DataLoader[Any]:
    """A loader of random images, batches of 64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (count,), generator=generator)
    data: Any = TensorDataset(x, y)
    return DataLoader(data if wrap is None else wrap(data), batch_size=64)


def measure(
    variants: Mapping[str, Callable[[], list[Callback]]],
    *,
    steps: int,
    rounds: int,
    module: Callable[[], L.LightningModule] = SmallConvnet,
    loader: Callable[[str], DataLoader[Any]] | None = None,
    **settings: Any,
) -> dict[str, list[float]]:
    """The mean step time of each variant in each round; rounds go through all variants.

    The mean, since some techniques act in every k-th step only.

    Args:
        variants: callbacks by name; the order within a round alternates.
        steps: training steps a round; the first tenth is left out.
        rounds: how often each variant is measured.
        module: makes the model.
        loader: makes the data of a variant.
        settings: further arguments of the Trainer.
    """
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds):
        names = list(variants) if round_number % 2 == 0 else list(variants)[::-1]
        for name in names:
            clock = StepTimes(steps)
            trainer = L.Trainer(
                accelerator="cpu",
                max_steps=steps,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[*variants[name](), clock],
                **settings,
            )
            torch.manual_seed(0)
            trainer.fit(module(), loader(name) if loader is not None else images(64 * 16))
            times[name].append(statistics.fmean(clock.seconds[steps // 10 :]))
    return times


def ratios(times: Mapping[str, list[float]], baseline: str) -> dict[str, tuple[float, float]]:
    """Median ratio to the baseline of the same round, and half its interquartile range."""
    found = {}
    for name, values in times.items():
        per_round = [v / b for v, b in zip(values, times[baseline], strict=True)]
        low, _, high = statistics.quantiles(per_round, n=4) if len(per_round) > 1 else (1, 1, 1)
        found[name] = (statistics.median(per_round), (high - low) / 2)
    return found
