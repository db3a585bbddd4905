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

COUNTS = [float(n) for n in range(10, 110, 10)]

# Weights, gradients, sharpness, averages.
WEIGHTS: dict[str, Callable[[], Callback]] = {
    "NormLoss": reg.NormLoss,
    "OrthogonalRegularizer": reg.OrthogonalRegularizer,
    "OrthogonalConvRegularizer": reg.OrthogonalConvRegularizer,
    "L1Penalty": reg.L1Penalty,
    "L2Penalty": reg.L2Penalty,
    "ElasticNet": reg.ElasticNet,
    "GroupLasso": reg.GroupLasso,
    "GroupSparseEnvelope": lambda: reg.GroupSparseEnvelope(k=64),
    "NuclearNorm": reg.NuclearNorm,
    "SpectralRegularization": reg.SpectralRegularization,
    "L2SP": reg.L2SP,
    "MaxNorm": reg.MaxNorm,
    "LogitAttenuatingWeightNorm": reg.LogitAttenuatingWeightNorm,
    "PreviousTaskAnchor": reg.PreviousTaskAnchor,
    "WeightCompander": reg.WeightCompander,
    "SpectralNormalization": reg.SpectralNormalization,
    "RandomSparseMask": reg.RandomSparseMask,
    "Mixout": reg.Mixout,
    "WeightNoise": reg.WeightNoise,
    "OrthoGrad": reg.OrthoGrad,
    "AdaptiveGradientClipping": reg.AdaptiveGradientClipping,
    "GradientCentralization": reg.GradientCentralization,
    "GradientNoise": reg.GradientNoise,
    "SAM": reg.SAM,
    "GSAM": reg.GSAM,
    "WSAM": reg.WSAM,
    "ESAM": reg.ESAM,
    "LookSAM": reg.LookSAM,
    "SAF": lambda: reg.SAF(start=0),
    "MESA": lambda: reg.MESA(start=0),
    "AdversarialModelPerturbation": reg.AdversarialModelPerturbation,
    "EMA": reg.EMA,
}

# Losses, labels, outputs, features, teachers.
LOSSES: dict[str, Callable[[], Callback]] = {
    "LabelSmoothing": reg.LabelSmoothing,
    "ACLS": reg.ACLS,
    "ConfidencePenalty": reg.ConfidencePenalty,
    "EntropyPenalty": reg.EntropyPenalty,
    "StableMax": reg.StableMax,
    "FocalLoss": reg.FocalLoss,
    "AdaFocal": reg.AdaFocal,
    "MMCE": reg.MMCE,
    "SoftBinnedECE": reg.SoftBinnedECE,
    "MDCA": reg.MDCA,
    "DCA": reg.DCA,
    "Flooding": lambda: reg.Flooding(level=0.01),
    "LDRLoss": reg.LDRLoss,
    "ALDRLoss": reg.ALDRLoss,
    "GeneralizedCrossEntropy": reg.GeneralizedCrossEntropy,
    "SymmetricCrossEntropy": reg.SymmetricCrossEntropy,
    "EarlyLearning": reg.EarlyLearning,
    "LogitAdjustedLoss": lambda: reg.LogitAdjustedLoss(class_counts=COUNTS),
    "ClassBalancedLoss": lambda: reg.ClassBalancedLoss(class_counts=COUNTS),
    "LabelDistributionAwareMargin": lambda: reg.LabelDistributionAwareMargin(class_counts=COUNTS),
    "DynamicLossReweighting": lambda: reg.DynamicLossReweighting(warmup=0),
    "KLRobustReweighting": reg.KLRobustReweighting,
    "VonNeumannEntropy": lambda: reg.VonNeumannEntropy(layer="encoder"),
    "ProgressiveSelfDistillation": lambda: reg.ProgressiveSelfDistillation(epochs=4),
    "HintonDistillation": lambda: reg.HintonDistillation(source="ema"),
    "DecoupledDistillation": lambda: reg.DecoupledDistillation(source="ema"),
    "PlackettLuceDistillation": lambda: reg.PlackettLuceDistillation(source="ema"),
}

# Inputs, activations, derivatives by the input.
INPUTS: dict[str, Callable[[], Callback]] = {
    "Mixup": reg.Mixup,
    "CutMix": reg.CutMix,
    "Cutout": reg.Cutout,
    "InstanceNoise": reg.InstanceNoise,
    "ZeroImputeMask": reg.ZeroImputeMask,
    "FeatureNoise": lambda: reg.FeatureNoise(layers="encoder"),
    "VeryLargeDropout": lambda: reg.VeryLargeDropout(layers="encoder"),
    "DropBlock": lambda: reg.DropBlock(layers="encoder.0"),
    "NestedDropout": lambda: reg.NestedDropout(layer="encoder"),
    "DropoutSchedule": reg.DropoutSchedule,
    "JacobianPenalty": reg.JacobianPenalty,
    "FisherInformationPenalty": reg.FisherInformationPenalty,
    "AdversarialTraining": reg.AdversarialTraining,
    "AAER": reg.AAER,
    "ELLE": reg.ELLE,
}

TECHNIQUES = {**WEIGHTS, **LOSSES, **INPUTS}

# Their step includes what it costs to tell samples apart.
INDEXED = ("ALDRLoss", "EarlyLearning", "ProgressiveSelfDistillation", "SAF")


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
