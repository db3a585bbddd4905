"""The cost of closed-form weight penalties alone, beside the autograd loops one writes by hand.

Run ``python examples/benchmarks/weight_penalties.py``; the weights of a ResNet-18 (11.2 M in 21
matrices), one thread, CPU time. Shares are those of its training step at batch 32 on images of
``--size`` pixels, measured in the same run. Steps that write the log also compute the penalty's
value: ``--logging`` measures those.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from timing import StepTimes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_reg as reg

BATCH = 32
Matrices = list[Tensor]


def _rows(weights: Matrices) -> Iterator[Tensor]:
    return (w.flatten(1) for w in weights)


def _total(terms: Iterator[Any]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _envelope(matrix: Tensor, kept: int) -> Tensor:
    """Half the squared norms of rows over their shares, by a sort."""
    norms = matrix.norm(dim=1)
    order = norms.sort(descending=True).values
    tail = order.flip(0).cumsum(0).flip(0)
    counts = kept - torch.arange(len(order))
    fits = (counts > 0) & (order * counts.clamp_min(1) <= tail)
    first = int(fits.int().argmax()) if fits.any() else min(kept, len(order)) - 1
    return order[:first].square().sum() / 2 + tail[first].square() / (2 * (kept - first))


# Ours, and the loop over weights whose backward autograd finds.
PAIRS: dict[str, tuple[Callable[[], Callback], Callable[[Matrices], Tensor]]] = {
    "L1Penalty": (
        lambda: reg.L1Penalty(mode="gradient"),
        lambda ws: _total(w.abs().sum() for w in ws),
    ),
    "L2Penalty": (
        lambda: reg.L2Penalty(mode="gradient"),
        lambda ws: _total(w.square().sum() / 2 for w in ws),
    ),
    "ElasticNet": (
        lambda: reg.ElasticNet(mode="gradient"),
        lambda ws: _total(0.5 * w.abs().sum() + 0.25 * w.square().sum() for w in ws),
    ),
    "GroupLasso": (
        lambda: reg.GroupLasso(mode="gradient"),
        lambda ws: _total(w.shape[1] ** 0.5 * w.norm(dim=1).sum() for w in _rows(ws)),
    ),
    "GroupSparseEnvelope": (
        lambda: reg.GroupSparseEnvelope(k=16, mode="gradient"),
        lambda ws: _total(_envelope(w, 16) for w in _rows(ws)),
    ),
    "NormLoss": (
        reg.NormLoss,
        lambda ws: _total((1 - w.norm(dim=1)).square().sum() for w in _rows(ws)),
    ),
    "TheoryScaledL1": (
        lambda: reg.TheoryScaledL1(samples=50_000, mode="gradient"),
        lambda ws: _total(w.shape[1] ** -0.5 * w.abs().sum() for w in _rows(ws)),
    ),
}


class Block(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            layers = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
            self.shortcut = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.shortcut(x))


class ResNet18(L.LightningModule):
    """A ResNet-18 with its cross-entropy; without images its gradients are zeros."""

    def __init__(self) -> None:
        super().__init__()
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        blocks = [Block(i, o) for i, o in itertools.pairwise(widths)]
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        self.body = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks)
        self.head = nn.Linear(512, 1000)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of random labels, or nothing that costs anything."""
        x = batch[0]
        if x.ndim < 4:
            return _total(p.sum() * 0 for p in self.parameters())
        logits = self.head(self.body(x).mean((2, 3)))
        return F.cross_entropy(logits, torch.arange(len(x)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD that moves nothing."""
        return torch.optim.SGD(self.parameters(), 0.0)


class PhaseTime(Callback):
    """The CPU time that a technique takes for its gradients."""

    def __init__(self, technique: Any) -> None:
        self.seconds: list[float] = []
        self._inner = technique.parameter_gradient
        technique.parameter_gradient = self._timed

    def _timed(self, update: Any) -> Any:
        began = time.process_time()
        value = self._inner(update)
        self.seconds.append(time.process_time() - began)
        return value


def fit(x: Tensor, steps: int, callbacks: list[Callback], logging: bool = False) -> None:
    """Train on one batch again and again."""
    data = TensorDataset(x.repeat(steps, *[1] * (x.ndim - 1)))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1 if logging else 10**6,
        callbacks=callbacks,
    )
    torch.manual_seed(0)
    trainer.fit(ResNet18(), DataLoader(data, batch_size=len(x)))


def seconds_of_step(size: int) -> float:
    """A training step at batch 32."""
    clock = StepTimes()
    fit(torch.randn(BATCH, 3, size, size), 4, [clock])
    return statistics.median(clock.seconds)


def seconds_of_ours(make: Callable[[], Callback], steps: int, logging: bool) -> float:
    """A technique's gradients, added to those of the weights."""
    technique = make()
    clock = PhaseTime(technique)
    fit(torch.zeros(1), steps, [technique], logging)
    return statistics.median(clock.seconds[1:])


def seconds_of_loop(penalty: Callable[[Matrices], Tensor], steps: int) -> float:
    """The penalty and its backward into gradients that are there already."""
    torch.manual_seed(0)
    weights = [p for p in ResNet18().parameters() if p.ndim > 1]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    seconds = []
    for _ in range(steps):
        began = time.process_time()
        (0.01 * penalty(weights)).backward()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds[1:])


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--logging", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    step = seconds_of_step(arguments.size)
    print(
        "| penalty | ms | of a step | the loop, ms | loop / ours |\n| --- | --- | --- | --- | --- |"
    )
    total = 0.0
    for name, (make, loop) in PAIRS.items():
        ours = seconds_of_ours(make, arguments.steps, arguments.logging)
        theirs = seconds_of_loop(loop, arguments.steps)
        total += ours
        print(
            f"| `{name}` | {1e3 * ours:.1f} | {ours / step:.2%} | {1e3 * theirs:.1f} | "
            f"{theirs / ours:.1f} |",
            flush=True,
        )
    print(f"| together | {1e3 * total:.1f} | {total / step:.2%} | | |")


if __name__ == "__main__":
    main()
