"""Peak memory and time of the cut cross-entropy against the plain one, forward and backward.

Run ``python examples/benchmarks/cut_cross_entropy.py``; a vocabulary of 128,000 on one thread.
Memory is what a loss adds to the peak of its process (each runs in a process of its own), beyond
inputs, weights and the gradients of both, which every loss has to hold. Time is CPU time, by turns
in one process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.functional import cut_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits, then their cross-entropy."""
    return F.cross_entropy(features @ weight.T, targets)


LOSSES: dict[str, Loss] = {"plain": plain, "cut": cut_cross_entropy}


def inputs(rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, the output layer and targets, with room for gradients."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, generator=generator)).requires_grad_()
    return features, weight, torch.randint(0, vocabulary, (rows,), generator=generator)


def run(loss: Loss, features: Tensor, weight: Tensor, targets: Tensor) -> float:
    """CPU seconds of one forward and backward."""
    features.grad = weight.grad = None
    start = time.process_time()
    loss(features, weight, targets).backward()
    return time.process_time() - start


def peak(name: str, sizes: list[int]) -> None:
    """Print the bytes that ``name`` adds to the peak of this process."""
    features, weight, targets = inputs(*sizes)
    # The gradients that are left behind, once, and what a first matrix product sets up.
    gradients = [torch.zeros_like(features), torch.zeros_like(weight)]
    (features[:1] @ weight[:1].T).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del gradients
    run(LOSSES[name], features, weight, targets)
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def peak_in_a_process(name: str, sizes: list[int]) -> int:
    """The same, measured in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, *map(str, sizes)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", default=[4096, 128, 128_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=list(LOSSES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        peak(arguments.peak, arguments.sizes)
        return
    memory = {name: peak_in_a_process(name, arguments.sizes) for name in LOSSES}
    data = inputs(*arguments.sizes)
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for number in range(arguments.rounds):
        for name in list(LOSSES) if number % 2 == 0 else list(LOSSES)[::-1]:
            times[name].append(run(LOSSES[name], *data))
    rows, width, vocabulary = arguments.sizes
    print(f"{rows} tokens, width {width}, vocabulary {vocabulary}\n")
    print("| loss | peak memory beyond gradients | time / plain |\n| --- | --- | --- |")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["plain"], strict=True)]
        size = memory[name] / 2**20
        print(f"| {name} | {size:.0f} MiB | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
