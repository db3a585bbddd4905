"""What ten techniques cost that are in the Trainer but have strength 0.

Run ``python examples/benchmarks/engine_overhead.py``; prints the step-time ratio to a run
without any technique, on a small convnet at batch 64.
"""

from __future__ import annotations

import argparse

from lightning.pytorch.callbacks import Callback
from timing import measure, ratios

import lightning_reg as reg


def ten() -> list[Callback]:
    """Ten techniques of different mechanisms, switched off."""
    return [
        reg.NormLoss(0.0),
        reg.OrthogonalRegularizer(0.0),
        reg.ConfidencePenalty(0.0),
        reg.EntropyPenalty(0.0),
        reg.VonNeumannEntropy(0.0, layer="encoder"),
        reg.LabelSmoothing(0.0),
        reg.Mixup(probability=0.0),
        reg.Cutout(probability=0.0),
        reg.SAM(rho=0.0),
        reg.ConfidencePenalty(0.0, name="second"),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    variants = {"none": list, "ten at strength 0": ten}
    times = measure(variants, steps=arguments.steps, rounds=arguments.rounds)
    for name, (ratio, spread) in ratios(times, "none").items():
        step = 1000 * sorted(times[name])[len(times[name]) // 2]
        print(f"{name:>18}: {step:6.2f} ms a step, ratio {ratio:.4f} ± {spread:.4f}")


if __name__ == "__main__":
    main()
