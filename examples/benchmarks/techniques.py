"""The step time of each technique at its default settings, as a ratio to the plain step.

Run ``python examples/benchmarks/techniques.py``; a small convnet at batch 64, one thread, each
technique interleaved with the plain run. ``--only SAM NormLoss`` measures some of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lightning.pytorch.callbacks import Callback
from timing import images, measure, ratios

import lightning_reg as reg

TECHNIQUES: dict[str, Callable[[], Callback]] = {
    "NormLoss": reg.NormLoss,
    "OrthogonalRegularizer": reg.OrthogonalRegularizer,
    "LogitAttenuatingWeightNorm": reg.LogitAttenuatingWeightNorm,
    "OrthoGrad": reg.OrthoGrad,
    "StableMax": reg.StableMax,
    "WeightCompander": reg.WeightCompander,
    "RandomSparseMask": reg.RandomSparseMask,
    "PreviousTaskAnchor": reg.PreviousTaskAnchor,
    "SAM": reg.SAM,
    "AdversarialModelPerturbation": reg.AdversarialModelPerturbation,
    "ConfidencePenalty": reg.ConfidencePenalty,
    "EntropyPenalty": reg.EntropyPenalty,
    "VonNeumannEntropy": lambda: reg.VonNeumannEntropy(layer="encoder"),
    "JacobianPenalty": reg.JacobianPenalty,
    "LabelSmoothing": reg.LabelSmoothing,
    "ACLS": reg.ACLS,
    "Mixup": reg.Mixup,
    "CutMix": reg.CutMix,
    "Cutout": reg.Cutout,
    "Mixout": reg.Mixout,
    "DropoutSchedule": reg.DropoutSchedule,
    "LDRLoss": reg.LDRLoss,
    "ALDRLoss": reg.ALDRLoss,
    "DynamicLossReweighting": lambda: reg.DynamicLossReweighting(warmup=0),
    "EarlyLearning": reg.EarlyLearning,
    "ProgressiveSelfDistillation": lambda: reg.ProgressiveSelfDistillation(epochs=4),
}


# Their step includes what it costs to tell samples apart.
INDEXED = ("ALDRLoss", "EarlyLearning", "ProgressiveSelfDistillation")


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=list(TECHNIQUES))
    arguments = parser.parse_args()
    chosen = {n: f for n, f in TECHNIQUES.items() if not arguments.only or n in arguments.only}
    print("| technique | step time / plain step |\n| --- | --- |")
    for name, make in chosen.items():
        ratio, spread = ratio_of(name, make, arguments.steps, arguments.rounds)
        print(f"| `{name}` | {ratio:.2f} ± {spread:.2f} |", flush=True)


def ratio_of(
    name: str, make: Callable[[], Callback], steps: int, rounds: int
) -> tuple[float, float]:
    """The ratio of one technique, each time measured next to a plain run."""
    variants: dict[str, Callable[[], list[Callback]]] = {"plain": list, name: lambda: [make()]}
    times = measure(
        variants,
        steps=steps,
        rounds=rounds,
        loader=lambda variant: images(64 * 16, reg.IndexedDataset if variant in INDEXED else None),
    )
    return ratios(times, "plain")[name]


if __name__ == "__main__":
    main()
