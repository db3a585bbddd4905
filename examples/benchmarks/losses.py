"""Step times of losses, labels, mixing and dropout, beside what a user would take today.

Run ``python examples/benchmarks/losses.py``: a small ResNet and a small transformer at batch 32,
one thread, CPU time, all variants of a model interleaved in one run. Beside ours stand versions
written by hand in plain PyTorch and those of ``timm`` and ``torchvision`` (left out where they
cannot be imported). ``--only Mixup RDrop`` measures some of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from models import BATCH, MODELS, images
from peers import Loop, Make, by_hand, optional, print_table, variants
from timing import measure
from torch import Tensor, nn
from torch.utils.data import Dataset

import lightning_reg as reg

COLUMNS = ("ours", "by hand", "timm", "torchvision")
CLASSES = 10
COUNTS = [float(n) for n in range(10, 110, 10)]
SIGMOID = "FocalLoss, sigmoid"
Rows = dict[str, dict[str, Make]]


def criterion(loss: Callable[[Tensor, Tensor], Tensor]) -> Make:
    """Another loss of logits and targets."""
    return by_hand(lambda module, x, y: loss(module(x), y))


def focal(logits: Tensor, y: Tensor) -> Tensor:
    """Weights each sample by how badly it is predicted."""
    nll = F.cross_entropy(logits, y, reduction="none")
    return ((1 - torch.exp(-nll)) ** 2 * nll).mean()


def generalized(logits: Tensor, y: Tensor) -> Tensor:
    """``(1 - p^q) / q``."""
    p = logits.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
    return ((1 - p**0.7) / 0.7).mean()


def symmetric(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy both ways."""
    p = logits.softmax(1).clamp(1e-7, 1.0)
    labels = F.one_hot(y, CLASSES).float().clamp(1e-4, 1.0)
    return 0.1 * F.cross_entropy(logits, y) - (p * labels.log()).sum(1).mean()


def class_balanced() -> Loop:
    """Weights by the effective number of samples."""
    weights = (1 - 0.9999) / (1 - 0.9999 ** torch.tensor(COUNTS))
    weights = weights / weights.sum() * CLASSES

    def loop(module: Any, x: Tensor, y: Tensor) -> Tensor:
        nll = F.cross_entropy(module(x), y, reduction="none")
        return (weights[y] * nll).mean()

    return loop


def logit_adjusted() -> Loop:
    """Shifts logits by the log of the classes' shares."""
    shift = (torch.tensor(COUNTS) / sum(COUNTS)).log()
    return lambda module, x, y: F.cross_entropy(module(x) + shift, y)


def confidence(logits: Tensor, y: Tensor) -> Tensor:
    """Rewards entropy."""
    log_p = logits.log_softmax(1)
    return F.cross_entropy(logits, y) + 0.1 * (log_p.exp() * log_p).sum(1).mean()


def mixup(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loop of the authors."""
    lam, order = np.random.beta(1.0, 1.0), torch.randperm(len(x))
    logits = module(lam * x + (1 - lam) * x[order])
    return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[order])


def cutmix(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loop of the authors."""
    lam, order = np.random.beta(1.0, 1.0), torch.randperm(len(x))
    height, width = x.shape[2:]
    half = 0.5 * np.sqrt(1 - lam)
    row, column = np.random.randint(height), np.random.randint(width)
    top, bottom = np.clip([row - int(half * height), row + int(half * height)], 0, height)
    left, right = np.clip([column - int(half * width), column + int(half * width)], 0, width)
    x = x.clone()
    x[:, :, top:bottom, left:right] = x[order, :, top:bottom, left:right]
    lam = 1 - float((bottom - top) * (right - left)) / (height * width)
    logits = module(x)
    return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[order])


def distillation(teacher: nn.Module) -> Loop:
    """Adds the divergence from the softened predictions of a network."""
    teacher.eval()

    def loop(module: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = (teacher(x) / 4).softmax(1)
        logits = module(x)
        softened = (logits / 4).log_softmax(1)
        divergence = F.kl_div(softened, target, reduction="batchmean")
        return F.cross_entropy(logits, y) + 9 * 16 * divergence

    return loop


def r_drop(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """Two passes whose predictions have to agree."""
    first, second = module(x), module(x)
    p, q = first.log_softmax(1), second.log_softmax(1)
    gap = F.kl_div(p, q, reduction="batchmean", log_target=True)
    gap = gap + F.kl_div(q, p, reduction="batchmean", log_target=True)
    return 0.5 * (F.cross_entropy(first, y) + F.cross_entropy(second, y) + gap)


class After(Callback):
    """Puts a module behind the encoder's first block.

    Args:
        module: what its output passes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hook it in."""
        block = pl_module.get_submodule("encoder.0")
        block.register_forward_hook(lambda part, inputs, output: self._module(output))


class OneHot(Dataset[Any]):
    """Labels as float vectors.

    Args:
        data: of images and classes.
    """

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self._data[index]
        return x, F.one_hot(y, CLASSES).float()


def own_rows(model: str) -> Rows:
    """Ours, and the versions by hand."""
    teacher = MODELS[model]()
    rows: Rows = {
        "FocalLoss": {"ours": lambda: [reg.FocalLoss()], "by hand": criterion(focal)},
        SIGMOID: {
            "ours": lambda: [reg.FocalLoss(alpha=0.25, task="multilabel", replaces="loss")],
        },
        "GeneralizedCrossEntropy": {
            "ours": lambda: [reg.GeneralizedCrossEntropy()],
            "by hand": criterion(generalized),
        },
        "SymmetricCrossEntropy": {
            "ours": lambda: [reg.SymmetricCrossEntropy()],
            "by hand": criterion(symmetric),
        },
        "ClassBalancedLoss": {
            "ours": lambda: [reg.ClassBalancedLoss(class_counts=COUNTS)],
            "by hand": by_hand(class_balanced()),
        },
        "LogitAdjustedLoss": {
            "ours": lambda: [reg.LogitAdjustedLoss(class_counts=COUNTS)],
            "by hand": by_hand(logit_adjusted()),
        },
        "LabelSmoothing": {
            "ours": lambda: [reg.LabelSmoothing(0.1)],
            "by hand": criterion(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)),
        },
        "ConfidencePenalty": {
            "ours": lambda: [reg.ConfidencePenalty(0.1)],
            "by hand": criterion(confidence),
        },
        "Mixup": {"ours": lambda: [reg.Mixup(1.0)], "by hand": by_hand(mixup)},
        "CutMix": {"ours": lambda: [reg.CutMix(1.0)], "by hand": by_hand(cutmix)},
        "HintonDistillation": {
            "ours": lambda: [reg.HintonDistillation(teacher=teacher)],
            "by hand": by_hand(distillation(teacher)),
        },
        "RDrop": {"ours": lambda: [reg.RDrop(1.0)], "by hand": by_hand(r_drop)},
    }
    if model == "resnet":
        for name, shared in (("DropBlock", False), ("DropBlock, shared channels", True)):
            rows[name] = {"ours": lambda shared=shared: [_drop_block(shared)]}  # type: ignore[misc]
    return rows


def _drop_block(shared: bool) -> Callback:
    return reg.DropBlock(0.1, layers="encoder.0", block_size=5, shared_channels=shared)


def add_timm(rows: Rows) -> None:
    """What timm has of them."""
    losses, data, layers = (optional(f"timm.{part}") for part in ("loss", "data", "layers"))
    if losses is None or data is None or layers is None:
        return

    def mixed(**settings: float) -> Make:
        mix = data.Mixup(label_smoothing=0.0, num_classes=CLASSES, **settings)
        soft = losses.SoftTargetCrossEntropy()

        def loop(module: Any, x: Tensor, y: Tensor) -> Tensor:
            # It mixes in place.
            inputs, labels = mix(x.clone(), y)
            loss: Tensor = soft(module(inputs), labels)
            return loss

        return by_hand(loop)

    rows["LabelSmoothing"]["timm"] = criterion(losses.LabelSmoothingCrossEntropy(0.1))
    rows["Mixup"]["timm"] = mixed(mixup_alpha=1.0, cutmix_alpha=0.0)
    rows["CutMix"]["timm"] = mixed(mixup_alpha=0.0, cutmix_alpha=1.0)
    for name, coupled in (("DropBlock", False), ("DropBlock, shared channels", True)):
        if name in rows:
            rows[name]["timm"] = lambda coupled=coupled: [  # type: ignore[misc]
                After(layers.DropBlock2d(0.1, 5, couple_channels=coupled))
            ]


def add_torchvision(rows: Rows) -> None:
    """What torchvision has of them."""
    ops, transforms = optional("torchvision.ops"), optional("torchvision.transforms.v2")
    if ops is None or transforms is None:
        return

    def mixed(kind: Callable[..., Any]) -> Make:
        mix = kind(alpha=1.0, num_classes=CLASSES)

        def loop(module: Any, x: Tensor, y: Tensor) -> Tensor:
            inputs, labels = mix(x, y)
            return F.cross_entropy(module(inputs), labels)

        return by_hand(loop)

    rows[SIGMOID]["torchvision"] = criterion(
        lambda z, y: ops.sigmoid_focal_loss(z, y, reduction="mean")
    )
    rows["Mixup"]["torchvision"] = mixed(transforms.MixUp)
    rows["CutMix"]["torchvision"] = mixed(transforms.CutMix)
    if "DropBlock" in rows:
        rows["DropBlock"]["torchvision"] = lambda: [After(ops.DropBlock2d(0.1, 5))]


def main() -> None:
    """Measure and print a table in Markdown for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="*", choices=list(own_rows("resnet")))
    arguments = parser.parse_args()
    for model in arguments.model:
        rows = own_rows(model)
        add_timm(rows)
        add_torchvision(rows)
        if arguments.only:
            rows = {name: cells for name, cells in rows.items() if name in arguments.only}
        times = measure(
            variants(rows),
            steps=arguments.steps,
            rounds=arguments.rounds,
            module=MODELS[model],
            loader=lambda name: images(OneHot if name.startswith(SIGMOID) else None),
        )
        print_table(f"{model}, batch {BATCH}: step / plain step", times, rows, COLUMNS)


if __name__ == "__main__":
    main()
