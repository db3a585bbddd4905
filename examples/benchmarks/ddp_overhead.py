"""What `ddp_reg` costs over `ddp`, and how many collectives techniques add to a step.

Run ``python examples/benchmarks/ddp_overhead.py``; two gloo processes on this machine, a small
convnet at batch 64 per rank. Times are ratios of rounds that alternate within the same processes;
collectives are those of all kinds that one training step launches, DDP's own included.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from timing import SmallConvnet, StepTimes, images, ratios
from torch.profiler import ProfilerActivity, profile

import lightning_reg as reg
from lightning_reg.testing import RankPair, rank_trainer

TEN: dict[str, Callable[[], Callback]] = {
    "SAM": lambda: reg.SAM(rho=0.05),
    "NormLoss": lambda: reg.NormLoss(1e-3),
    "OrthogonalRegularizer": lambda: reg.OrthogonalRegularizer(1e-3),
    "LogitAttenuatingWeightNorm": reg.LogitAttenuatingWeightNorm,
    "ConfidencePenalty": lambda: reg.ConfidencePenalty(0.1),
    "EntropyPenalty": lambda: reg.EntropyPenalty(0.1),
    "VonNeumannEntropy": lambda: reg.VonNeumannEntropy(0.01, layer="encoder"),
    "LabelSmoothing": lambda: reg.LabelSmoothing(0.1),
    "Cutout": reg.Cutout,
    "EarlyLearning": lambda: reg.EarlyLearning(1.0),
}


# Those that need of other ranks no more than sums over samples: no gather and no second pass.
MEANS: dict[str, Callable[[], Callback]] = {
    **{
        name: make
        for name, make in TEN.items()
        if name not in ("SAM", "VonNeumannEntropy", "EarlyLearning")
    },
    "JacobianPenalty": lambda: reg.JacobianPenalty(0.1),
    "Mixout": lambda: reg.Mixout(0.1),
    "OrthoGrad": reg.OrthoGrad,
}


class CollectiveCounter(Callback):
    """Counts the collectives of some steps, after those in which DDP still arranges buckets.

    Args:
        steps: how many are counted.
    """

    warm_up = 3

    def __init__(self, steps: int = 4) -> None:
        self.steps = steps
        self.counts: Counter[str] = Counter()
        self._profile: profile | None = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start or stop."""
        if batch_idx == self.warm_up:
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.start()
        elif batch_idx == self.warm_up + self.steps and self._profile is not None:
            self._profile.stop()
            names = [e.name for e in self._profile.events() if e.name.startswith("c10d::")]
            self.counts = Counter(name.removeprefix("c10d::").strip("_") for name in names)

    def per_step(self) -> dict[str, float]:
        """Collectives in one step, by kind."""
        return {kind: count / self.steps for kind, count in sorted(self.counts.items())}


def train(strategy: str, techniques: list[str], watch: Callback, steps: int) -> None:
    """One training on this rank."""
    torch.manual_seed(0)
    callbacks = [{**TEN, **MEANS}[name]() for name in techniques]
    trainer = rank_trainer(
        strategy=strategy, max_steps=steps, callbacks=[*callbacks, watch], log_every_n_steps=50
    )
    # Techniques take the index off a batch; without any nobody would.
    loader = images(2 * 64 * steps, reg.IndexedDataset if techniques else None)
    trainer.fit(SmallConvnet(), loader)


def count(strategy: str, techniques: list[str]) -> dict[str, float]:
    """Collectives per step; runs on every rank."""
    counter = CollectiveCounter()
    train(strategy, techniques, counter, counter.warm_up + counter.steps + 1)
    return counter.per_step()


def time(strategy: str, steps: int) -> float:
    """Median step time without any technique; runs on every rank."""
    clock = StepTimes()
    train(strategy, [], clock, steps)
    return statistics.median(clock.seconds[steps // 10 :])


def main() -> None:
    """Measure and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--each", action="store_true", help="count each technique alone, too")
    arguments = parser.parse_args()
    with RankPair() as ranks:
        times: dict[str, list[float]] = {"ddp": [], "ddp_reg": []}
        for number in range(arguments.rounds):
            for name in list(times) if number % 2 == 0 else list(times)[::-1]:
                times[name].append(max(ranks.run(time, name, arguments.steps)))
        ratio, spread = ratios(times, "ddp")["ddp_reg"]
        print("| no technique | step time / `ddp` |\n| --- | --- |")
        print(f"| `ddp_reg` | {ratio:.3f} ± {spread:.3f} |\n")
        rows = {"none": [], "ten whose numbers are means": list(MEANS), "all ten": list(TEN)}
        if arguments.each:
            rows |= {name: [name] for name in TEN}
        print("| techniques | strategy | collectives a step | kinds |\n| --- | --- | --- | --- |")
        for name, techniques in rows.items():
            for strategy in times:
                found = ranks.run(count, strategy, techniques)[0]
                kinds = ", ".join(f"{kind} {number:g}" for kind, number in found.items())
                print(f"| {name} | `{strategy}` | {sum(found.values()):g} | {kinds} |")


if __name__ == "__main__":
    main()
