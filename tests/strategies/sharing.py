"""Runs on two ranks that show who computes which part of a penalty on weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from lightning_reg.engine import ParameterUpdate, Regularizer
from lightning_reg.mechanisms.weight_penalty import WeightPenalty
from lightning_reg.strategies.ddp_reg import RegularizedDDPStrategy
from lightning_reg.techniques.sharpness.sam import SAM
from lightning_reg.techniques.weights.orthogonal_regularizer import OrthogonalRegularizer
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import Host, loader, weights


class Quartic(WeightPenalty):
    """A quarter of the sum of fourth powers; keeps the shapes that it was asked about."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[list[tuple[int, ...]]] = []

    def values(self, matrices):
        self.asked.append([tuple(m.shape) for m in matrices])
        return torch.stack([m.pow(4).sum() / 4 for m in matrices])

    def closed_form(self, matrices):
        return self.values(matrices), [m.pow(3) for m in matrices]


class Deep(Host):
    """Five weights of different sizes, and one that the loss reaches only if it is told to."""

    def __init__(self, reach: bool = True, manual: bool = False, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = not manual
        layers = [nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 6), nn.Linear(6, 4)]
        self.net = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())])
        self.beside = nn.Linear(8, 4, bias=False)
        self.reach = reach
        self.fused = fused

    def forward(self, x):
        logits = self.net(x)
        return logits + self.beside(x) if self.reach else logits

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, fused=self.fused)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


class KeepGradients(Regularizer):
    """What phase 7 and the optimizer get."""

    reads = frozenset({"gradients"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def edit_gradients(self, update: ParameterUpdate) -> None:
        grads = [p.grad for p in update.module.parameters() if p.grad is not None]
        self.seen.append(torch.cat([g.flatten() for g in grads]))


class Compress(Callback):
    """Registers a hook that halves the bytes of DDP's messages; Lightning does so on GPUs only."""

    def on_fit_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(None, default_hooks.fp16_compress_hook)


def _half() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


# Settings of the strategy, and of the Trainer.
VARIANTS: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, dict),
    "find_unused": ({"find_unused_parameters": True}, dict),
    "static_graph": ({"static_graph": True}, dict),
    "bucket_view": ({"gradient_as_bucket_view": True}, dict),
    "accumulated": ({"find_unused_parameters": True}, lambda: {"accumulate_grad_batches": 2}),
    "uneven_window": ({}, lambda: {"accumulate_grad_batches": 3}),
    "fp16": ({}, _half),
    # Gradients keep the scale of the loss until the optimizer's own step.
    "fp16_fused": ({}, _half),
    "clipped": ({}, lambda: {"gradient_clip_val": 0.3}),
}


def trained(
    strategy: Any, techniques: Any, host: L.LightningModule | None = None, **settings: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """Weights and logs of two epochs (8 batches a rank)."""
    module = host if host is not None else Deep()
    run = rank_trainer(strategy=strategy, callbacks=list(techniques), max_epochs=2, **settings)
    run.fit(module, loader(8))
    logged = {k: float(v) for k, v in run.callback_metrics.items() if k.startswith("reg/")}
    return weights(module), logged


def both(variant: str, mode: str, reach: bool = True) -> dict[str, Any]:
    """The same run with the penalties split over ranks, and whole on each."""
    strategy, settings = VARIANTS[variant]
    found: dict[str, Any] = {}
    for name, kind in (("split", RegularizedDDPStrategy), ("whole", DDPStrategy)):
        quartic = Quartic(0.5, mode=mode)
        # Alone, it leaves the weight that the loss does not reach to one of the ranks.
        others = [OrthogonalRegularizer(0.05, form="full", mode=mode)] if reach else []
        host = Deep(reach, fused="fused" in variant)
        found[name] = trained(kind(**strategy), [quartic, *others], host, **settings())
        found[f"{name}_asked"] = quartic.asked
    return found


def without() -> torch.Tensor:
    """The weights that no penalty acts on."""
    return trained("ddp", [])[0]


def beside_a_perturbation(mode: str) -> dict[str, Any]:
    """With SAM, each rank of which follows the gradient of its own loss."""
    found: dict[str, Any] = {}
    for name in ("ddp_reg", "ddp"):
        quartic = Quartic(0.5, mode=mode)
        found[name] = trained(name, [quartic, SAM(0.5)])[0]
        found[f"{name}_asked"] = quartic.asked
    return found


def whole_on_each_rank(reason: str) -> list[int]:
    """How many weights each evaluation looked at, where the work cannot be split."""
    quartic = Quartic(0.5)
    techniques = [quartic, Compress()] if reason == "hook" else [quartic]
    host = Deep(manual=reason == "manual")
    if reason == "ignored":
        host._ddp_params_and_buffers_to_ignore = ["beside.weight"]
    trained("ddp_reg_find_unused_parameters_true", techniques, host)
    return [len(shapes) for shapes in quartic.asked]


def gradients(strategy: str) -> list[torch.Tensor]:
    """The gradients that the optimizer gets, in two steps."""
    keep = KeepGradients()
    trained(strategy, [Quartic(0.5), keep], accumulate_grad_batches=2, max_steps=2)
    return keep.seen
