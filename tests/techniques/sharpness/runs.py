"""Runs of a tiny classifier with a weight perturbation, on one process and on every rank.

Everything is at module level, since rank processes import what they call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DistributedSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_reg.engine import Regularizer, Step
from lightning_reg.engine.exact_resume import ExactResume
from lightning_reg.techniques.sharpness.adversarial_model_perturbation import (
    AdversarialModelPerturbation,
)
from lightning_reg.techniques.sharpness.esam import ESAM
from lightning_reg.techniques.sharpness.gsam import GSAM
from lightning_reg.techniques.sharpness.look_sam import LookSAM
from lightning_reg.techniques.sharpness.sam import SAM
from lightning_reg.techniques.sharpness.wsam import WSAM
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, trainer, weights

TECHNIQUES = {
    "SAM": SAM,
    "AMP": AdversarialModelPerturbation,
    "GSAM": GSAM,
    "WSAM": WSAM,
    "LookSAM": LookSAM,
    "ESAM": ESAM,
}
STRATEGIES: dict[str, Any] = {
    "plain": lambda: DDPStrategy(),
    "find_unused": lambda: DDPStrategy(find_unused_parameters=True),
    "static_graph": lambda: DDPStrategy(static_graph=True),
    "bucket_view": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "ddp_reg": lambda: "ddp_reg",
}


@dataclass(frozen=True)
class Setting:
    """One way to train; ``technique`` is a name in TECHNIQUES or empty."""

    technique: str = "SAM"
    arguments: dict[str, Any] = field(default_factory=dict)
    batch: int = 8
    accumulate: int = 1
    epochs: int = 1
    precision: str = "32-true"
    strategy: str = "plain"
    host: dict[str, Any] = field(default_factory=dict)
    hard: str = ""
    penalty: bool = False


@dataclass
class Outcome:
    """What a run leaves; ``history`` has the weights after each batch, ``seen`` in each pass."""

    weights: torch.Tensor
    history: list[torch.Tensor]
    metrics: dict[str, float]
    buffers: dict[str, torch.Tensor]
    losses: list[float]
    seen: list[torch.Tensor]


class Sometimes(Host):
    """Has a layer that no batch uses, and one that only every second micro-batch uses."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.never = nn.Linear(2, 2)
        self.sometimes = nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 2 == 0:
            loss = loss + F.cross_entropy(self.sometimes(batch[0]), batch[1])
        return loss


class Overflows(Host):
    """On rank 1 (or alone) the second batch's gradient overflows in fp16; keeps what it saw."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(weights(self).clone())
        loss = super().training_step(batch, batch_idx)
        last = not dist.is_initialized() or dist.get_rank() == 1
        return loss * 1e38 if batch_idx == 1 and last else loss


HOSTS = {"": Host, "sometimes": Sometimes, "overflows": Overflows}


class JointSpread(Regularizer):
    """A penalty with collectives: minus the variance of all ranks' logits."""

    needs = ("logits",)
    semantics = "global"

    def penalty(self, step: Step) -> torch.Tensor:
        return -step.comm.gather(step.logits).var(0).mean()


class History(Callback):
    """Weights and loss after each batch."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(weights(pl_module).clone())
        self.losses.append(float(outputs["loss"]))


def train(setting: Setting, folder: str = "", resume: str = "", **settings: Any) -> Outcome:
    """Train; on all ranks if this is one of them."""
    module = HOSTS[setting.hard](**setting.host)
    history = History()
    callbacks: list[Callback] = [history]
    if setting.technique:
        callbacks.append(TECHNIQUES[setting.technique](**setting.arguments))
    if setting.penalty:
        callbacks.append(JointSpread(0.1))
    if folder or resume:
        callbacks.append(ExactResume())
    if folder:
        callbacks.append(
            L.pytorch.callbacks.ModelCheckpoint(
                folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
            )
        )
        settings["enable_checkpointing"] = True
    if setting.precision == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    else:
        settings["precision"] = setting.precision
    settings |= {
        "callbacks": callbacks,
        "max_epochs": setting.epochs,
        "accumulate_grad_batches": setting.accumulate,
        "use_distributed_sampler": False,
    }
    if dist.is_initialized():
        run = rank_trainer(strategy=STRATEGIES[setting.strategy](), **settings)
    else:
        run = trainer(**settings)
    torch.manual_seed(5)
    run.fit(module, loader(setting.batch, shuffle=bool(folder or resume)), ckpt_path=resume or None)
    return Outcome(
        weights(module),
        history.weights,
        {k: float(v) for k, v in run.callback_metrics.items()},
        {k: v.clone() for k, v in module.named_buffers()},
        history.losses,
        getattr(module, "seen", []),
    )


def loader(batch: int, shuffle: bool) -> Any:
    """The dataset, dealt to the ranks in turn where there are several."""
    data = TensorDataset(INPUTS, LABELS)
    if not dist.is_initialized():
        return StatefulDataLoader(data, batch_size=batch, shuffle=shuffle)
    # Lightning's own sampler always shuffles while training.
    sampler = DistributedSampler(data, shuffle=shuffle)
    return StatefulDataLoader(data, batch_size=batch, sampler=sampler)


def windows(setting: Setting, world: int) -> list[list[list[torch.Tensor]]]:
    """Dataset positions as ``[window][rank][micro-batch]``, as a DistributedSampler deals them."""
    per_rank = [
        torch.arange(len(INPUTS))[rank::world].split(setting.batch) for rank in range(world)
    ]
    count = len(per_rank[0])
    return [
        [list(micro[i : i + setting.accumulate]) for micro in per_rank]
        for i in range(0, count, setting.accumulate)
    ]


def reference(setting: Setting, sharpness: str, rho: float, world: int = 1) -> torch.Tensor:
    """SAM with plain SGD with momentum, as a loop over groups that share a perturbation."""
    module = Host(**setting.host)
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)

    def gradient(index: torch.Tensor) -> list[torch.Tensor]:
        loss = F.cross_entropy(module(INPUTS[index]), LABELS[index])
        return list(torch.autograd.grad(loss, parameters))

    for _ in range(setting.epochs):
        for window in windows(setting, world):
            of_ranks = [torch.cat(micro) for micro in window]
            groups = {
                "micro": [part for micro in window for part in micro],
                "rank": of_ranks,
                "global": [torch.cat(of_ranks)],
            }[sharpness]
            kept = [p.detach().clone() for p in parameters]
            mean = [torch.zeros_like(p) for p in parameters]
            for group in groups:
                ascent = gradient(group)
                norm = torch.cat([g.flatten() for g in ascent]).norm()
                with torch.no_grad():
                    for p, g in zip(parameters, ascent, strict=True):
                        p += rho * g / norm
                for m, g in zip(mean, gradient(group), strict=True):
                    m += g / len(groups)
                with torch.no_grad():
                    for p, k in zip(parameters, kept, strict=True):
                        p.copy_(k)
            for p, m in zip(parameters, mean, strict=True):
                p.grad = m
            optimizer.step()
    return weights(module)
