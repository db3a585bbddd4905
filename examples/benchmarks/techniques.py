"""The step time of each technique, as a ratio to the plain step of the same task.

Run ``python examples/benchmarks/techniques.py``: a small ResNet and a small transformer at batch
32, one thread, CPU time, each technique interleaved with the plain run. Techniques act at their
defaults where they have any and from the first step on. ``--only SAM NormLoss`` measures some of
them, ``--list`` names those that are not measured here, and why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from models import MODELS, Classifier, images
from timing import measure, ratios
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_reg as reg
from lightning_reg import catalogue

COUNTS = [float(n) for n in range(10, 110, 10)]
GROUPS = reg.Signals(domain="batch.2")


# What cannot be made without arguments, or would wait; by the name of the model.
SETTINGS: dict[str, Callable[[str], Callback]] = {
    "AttentionEntropyMaximization": lambda m: reg.AttentionEntropyMaximization(
        -1.0, layers="head", from_logits=True
    ),
    "AttentionEntropyRegularization": lambda m: reg.AttentionEntropyRegularization(
        1.0, layers="head", from_logits=True
    ),
    "AnyLoss": lambda m: reg.AnyLoss(task="multilabel"),
    "BagInstanceInterpolation": lambda m: reg.BagInstanceInterpolation(signals=GROUPS),
    "ClassBalancedLoss": lambda m: reg.ClassBalancedLoss(class_counts=COUNTS),
    "ClassRelationDistillation": lambda m: reg.ClassRelationDistillation(
        known=8, teacher=MODELS[m]()
    ),
    "CoTeaching": lambda m: reg.CoTeaching(forget_rate=0.2),
    "DecoupledDistillation": lambda m: reg.DecoupledDistillation(source="ema"),
    "DiscreteInfomax": lambda m: reg.DiscreteInfomax(layer="encoder", entries=32),
    "DropBlock": lambda m: reg.DropBlock(layers="encoder.0"),
    "ExpertDropout": lambda m: reg.ExpertDropout(layers="encoder"),
    "FeatureNoise": lambda m: reg.FeatureNoise(layers="encoder"),
    "Flooding": lambda m: reg.Flooding(level=0.01),
    "FunctionalEntropyRegularizer": lambda m: reg.FunctionalEntropyRegularizer(layers="encoder"),
    "GroupDRO": lambda m: reg.GroupDRO(num_groups=4, signals=GROUPS),
    "GroupSparseEnvelope": lambda m: reg.GroupSparseEnvelope(k=64),
    "HintonDistillation": lambda m: reg.HintonDistillation(source="ema"),
    "LabelDistributionAwareMargin": lambda m: reg.LabelDistributionAwareMargin(class_counts=COUNTS),
    "LogitAdjustedLoss": lambda m: reg.LogitAdjustedLoss(class_counts=COUNTS),
    "LowRankProjection": lambda m: reg.LowRankProjection(rank=8),
    "MESA": lambda m: reg.MESA(start=0),
    "MTARD": lambda m: reg.MTARD(clean_teacher=MODELS[m](), robust_teacher=MODELS[m]()),
    "Metrix": lambda m: reg.Metrix(layer="encoder"),
    "MannWhitneyLoss": lambda m: reg.MannWhitneyLoss(task="multilabel"),
    "MixSwitch": lambda m: reg.MixSwitch(mixers=[reg.Mixup(), reg.CutMix()]),
    "ModalityDropout": lambda m: reg.ModalityDropout(layers=["encoder", "head"]),
    "NestedDropout": lambda m: reg.NestedDropout(layer="encoder"),
    "NeuralCollapseRegularizer": lambda m: reg.NeuralCollapseRegularizer(
        num_classes=10, layer="encoder"
    ),
    "NoiseFiT": lambda m: reg.NoiseFiT(layers=["encoder", "head"], k=2),
    "NormDirectionDistillation": lambda m: reg.NormDirectionDistillation(
        layer="encoder", teacher=MODELS[m]()
    ),
    "PlackettLuceDistillation": lambda m: reg.PlackettLuceDistillation(source="ema"),
    "PriorAwareEntropy": lambda m: reg.PriorAwareEntropy(prior=[0.1] * 10),
    "ProgressiveSelfDistillation": lambda m: reg.ProgressiveSelfDistillation(epochs=4),
    "RightForRightReasons": lambda m: reg.RightForRightReasons(10.0, mask="2"),
    "SAF": lambda m: reg.SAF(start=0),
    "DynamicLossReweighting": lambda m: reg.DynamicLossReweighting(warmup=0),
    "SWA": lambda m: reg.SWA(start=0),
    "ScoreDistributionSoftLabel": lambda m: reg.ScoreDistributionSoftLabel(mean="batch.2", std=1.0),
    "TheoryScaledL1": lambda m: reg.TheoryScaledL1(samples=50_000),
    "ThurstoneFidelityLoss": lambda m: reg.ThurstoneFidelityLoss(true_mean="batch.2", true_std=1.0),
    "TokenRelationshipGraphDistillation": lambda m: reg.TokenRelationshipGraphDistillation(
        layer="encoder", teacher=MODELS[m]()
    ),
    "TwoTeacherRegression": lambda m: reg.TwoTeacherRegression(
        tough_teacher=MODELS[m](), tolerant_teacher=MODELS[m]()
    ),
    "UDIM": lambda m: reg.UDIM(layer="encoder"),
    "VeryLargeDropout": lambda m: reg.VeryLargeDropout(layers="encoder"),
    "VonNeumannEntropy": lambda m: reg.VonNeumannEntropy(layer="encoder"),
    "WorstGroupLoss": lambda m: reg.WorstGroupLoss(num_groups=4, signals=GROUPS),
    "AdaptiveRegularizationSchedule": lambda m: reg.AdaptiveRegularizationSchedule(
        dropout=[0.1, 0.3], stages=2
    ),
    "ManifoldLipschitzDual": lambda m: reg.ManifoldLipschitzDual(bandwidth=1.0),
    "ManifoldMixup": lambda m: reg.ManifoldMixup(layers=["encoder"]),
}


class Views(Classifier):
    """The classifier, which also returns two embeddings of each sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Cross-entropy of both views."""
        x, y = batch[:2]
        z1, z2 = self.encoder(x), self.encoder(x + 0.1 * torch.randn_like(x))
        logits = self.head(torch.cat([z1, z2]))
        loss = F.cross_entropy(logits, y.repeat(2))
        return {"loss": loss, "logits": logits[: len(x)], "z1": z1, "z2": z2}


class Grouped(Classifier):
    """The classifier, on batches that say which group a sample belongs to."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return super().training_step(batch[:2], batch_idx)


class Regression(Classifier):
    """Ten numbers from an image, as a field on ten places."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The squared error."""
        return F.mse_loss(self(batch[0]), batch[1])


class Scores(Classifier):
    """One score of a sample."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__(encoder, width)
        self.head = nn.Linear(width, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logistic loss."""
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


class Critic(Classifier, reg.RegularizeMixin):
    """The model as a critic of images, under manual optimization."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__(encoder, width)
        self.automatic_optimization = False

    def critic(self, x: Tensor) -> Tensor:
        """One score of each image."""
        return self(x)[:, 0]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """One step of the critic alone."""
        real, fake = batch[0], torch.randn_like(batch[0])
        loss = self.critic(fake).mean() - self.critic(real).mean()
        loss = self.regularize(loss, critic=self.critic, real=real, fake=fake)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def _with_groups(data: Any) -> Any:
    x, y = data.tensors
    return torch.utils.data.TensorDataset(x, y, y % 4)


def _fields(data: Any) -> Any:
    x, y = data.tensors
    return torch.utils.data.TensorDataset(x, F.one_hot(y, 10).float())


def _with_masks(data: Any) -> Any:
    x, y = data.tensors
    return torch.utils.data.TensorDataset(x, y, (x > 1).float())


def _bags(data: Any) -> Any:
    x, y = data.tensors
    return torch.utils.data.TensorDataset(x, F.one_hot(y, 10).float(), y % 4)


def _binary(data: Any) -> Any:
    x, y = data.tensors
    return torch.utils.data.TensorDataset(x, (y % 2).float()[:, None])


Task = tuple[type[Classifier], Callable[[Any], Any] | None]
TASKS: dict[str, Task] = {
    "classes": (Classifier, None),
    "classes, indexed": (Classifier, reg.IndexedDataset),
    "views": (Views, None),
    "views, indexed": (Views, reg.IndexedDataset),
    "groups": (Grouped, _with_groups),
    "binary": (Scores, _binary),
    "masks": (Grouped, _with_masks),
    "fields": (Regression, _fields),
    "bags": (Regression, _bags),
    "critic": (Critic, None),
}
OTHER_TASKS = {
    "ALDRLoss": "classes, indexed",
    "AdaWAC": "views, indexed",
    "AnyLoss": "binary",
    "BagInstanceInterpolation": "bags",
    "DecoupledContrastive": "views",
    "DraganPenalty": "critic",
    "DynamicBadPairMining": "views, indexed",
    "EarlyLearning": "classes, indexed",
    "FocalInfoNCE": "views",
    "GroupDRO": "groups",
    "H1SeminormLoss": "fields",
    "ManifoldLipschitzDual": "classes, indexed",
    "MannWhitneyContrastive": "views",
    "MannWhitneyLoss": "binary",
    "MatchingSurrogateLoss": "binary",
    "OnlineHardNegativeMixing": "views",
    "ProgressiveSelfDistillation": "classes, indexed",
    "R1Penalty": "critic",
    "R2Penalty": "critic",
    "RegularizeOnlyOnRepeat": "classes, indexed",
    "RightForRightReasons": "masks",
    "SAF": "classes, indexed",
    "ScoreDistributionSoftLabel": "groups",
    "SobolevNormLoss": "fields",
    "ThurstoneFidelityLoss": "groups",
    "TwoTeacherRegression": "fields",
    "VICReg": "views",
    "WassersteinGradientPenalty": "critic",
    "WorstGroupLoss": "groups",
}

# Of a model, where the other one has not got what a technique acts on.
ONLY = {
    "DropBlock": "resnet",
    "OrthogonalConvRegularizer": "resnet",
}

NOT_HERE = {
    "AugmentationPolicy": "needs torchvision, whose transforms are all that it costs",
    "LassoTaskWeights": "needs a classifier for each task",
    "LieSymmetryAugment": "moves solutions of differential equations",
    "CDEP": "decomposes layers that residual blocks and attention are not made of",
    "ClassGaussianCalibration": "a second stage: a pass over the data, then a linear layer",
    "ConditionalMoERouting": "needs a mixture of experts",
    "EATA": "adapts at test time",
    "EarthMoverTokenLoss": "needs a language model",
    "EMAReferenceKL": "needs a policy",
    "ExactGaussNewton": "a backward pass for each of a batch's outputs, here 320 a step",
    "MiniBatchAwareL2": "needs embeddings of sparse features",
    "ModelSoup": "acts once, at the end",
    "MuParametrization": "acts once, at the start",
    "ParallelPathProductPenalty": "needs parallel branches",
    "PathNormPenalty": "needs a chain of two linear layers",
    "PhasedCurriculum": "chooses samples; a step costs what it did",
    "PoincareProjection": "needs embeddings",
    "PrincipalGradientAggregation": "acts between ranks",
    "ReconstructionContraction": "needs an autoencoder",
    "SchattenShrinkageReadout": "acts once, at the end",
    "SliceDiscoveryRebalancing": "a second stage: a pass over the data, then a linear layer",
    "Tent": "adapts at test time",
    "VanishingGradientRegularizer": "needs a recurrent network",
    "ZeroDiagonalRidge": "acts once, at the end",
}


def measured() -> list[str]:
    """The techniques that this script measures."""
    return [c.__name__ for c in catalogue.callbacks() if c.__name__ not in NOT_HERE]


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="*", choices=measured(), metavar="TECHNIQUE")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        for name, reason in NOT_HERE.items():
            print(f"{name}: {reason}")
        return
    models = arguments.model
    print(f"| technique | {' | '.join(models)} |\n| --- |{' --- |' * len(models)}")
    for name in arguments.only or measured():
        row = [_cell(name, model, arguments.steps, arguments.rounds) for model in models]
        print(f"| `{name}` | {' | '.join(row)} |", flush=True)


def _cell(name: str, model: str, steps: int, rounds: int) -> str:
    if ONLY.get(name, model) != model:
        return "\N{EN DASH}"
    ratio, spread = ratio_of(name, model, steps, rounds)
    return f"{ratio:.2f} ± {spread:.2f}"


def ratio_of(name: str, model: str, steps: int, rounds: int) -> tuple[float, float]:
    """The ratio of one technique, each time measured next to a plain run of its task."""
    kind, wrap = TASKS[OTHER_TASKS.get(name, "classes")]
    plain_wrap = None if wrap is reg.IndexedDataset else wrap
    make = SETTINGS.get(name, lambda _: getattr(reg, name)())
    times = measure(
        {"plain": list, name: lambda: [make(model)]},
        steps=steps,
        rounds=rounds,
        module=lambda: MODELS[model](kind),
        # What it costs to tell samples apart is part of a technique that has to.
        loader=lambda variant: images(plain_wrap if variant == "plain" else wrap),
    )
    return ratios(times, "plain")[name]


if __name__ == "__main__":
    main()
