"""A tiny classifier, its data, and one technique a phase, for tests of the engine."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import Regularizer, Step
from lightning_reg.mechanisms.weight_perturbation import WeightPerturbation

CLASSES = 4
_generator = torch.Generator().manual_seed(0)
INPUTS = torch.randn(64, 8, generator=_generator)
LABELS = torch.randint(0, CLASSES, (64,), generator=_generator)


class Host(L.LightningModule):
    def __init__(self, batch_norm: bool = False, dropout: float = 0.0, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        norm = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
        self.net = nn.Sequential(
            nn.Linear(8, 16), norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, CLASSES)
        )
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Confidence(Regularizer):
    """A penalty on logits."""

    needs = ("logits",)

    def penalty(self, step: Step) -> torch.Tensor:
        p = step.logits.softmax(-1)
        return (p * p.log()).sum(-1).mean()


class Smoothing(Regularizer):
    """A change of targets."""

    needs = ("logits", "targets")
    exclusive = frozenset({"label_smoothing"})

    def __init__(self, strength: float, replaces: str = "cross_entropy", **kwargs: Any) -> None:
        super().__init__(strength, **kwargs)
        self.replaces = replaces

    def transform_targets(self, step: Step, distribution: torch.Tensor) -> torch.Tensor:
        s = step.strength(self)
        return distribution * (1 - s) + s / distribution.shape[-1]


class Ascent(WeightPerturbation):
    """SAM's perturbation."""

    def __init__(self, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(rho, **kwargs)

    def perturbation(self, weights, gradients, strength):
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return list(torch._foreach_mul(gradients, strength / (norm + 1e-12)))


def loader(batch_size: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=batch_size)


def trainer(callbacks=(), **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def fit(callbacks=(), module=None, batch_size: int = 16, **kwargs: Any):
    module = module if module is not None else Host()
    run = trainer(callbacks, **kwargs)
    run.fit(module, loader(batch_size))
    return module, run


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
