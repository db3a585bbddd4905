"""Runs on two ranks whose replicas drift apart in known ways."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_reg import catalogue
from lightning_reg.engine import ParameterUpdate, Regularizer
from lightning_reg.strategies.ddp_reg import RegularizedDDPStrategy
from lightning_reg.strategies.guard import ReplicaError
from lightning_reg.techniques.sharpness.sam import SAM
from lightning_reg.testing.ranks import rank_trainer
from lightning_reg.testing.subject import Subject
from tests.contract import cases
from tests.engine.simple import Host, loader, weights


class Drifts(Regularizer):
    """Projects weights to another place on each rank."""

    def project(self, update: ParameterUpdate) -> None:
        with torch.no_grad():
            update.module.net[4].weight[0, 0] += 1e-3 * update.comm.rank


class DriftsByGradient(Regularizer):
    """Edits gradients in another way on each rank."""

    def edit_gradients(self, update: ParameterUpdate) -> None:
        update.module.net[4].bias.grad += 1e-3 * update.comm.rank


class StateDrifts(Regularizer):
    """Its state, but nothing else, is another one on each rank."""

    def penalty(self, step: Any) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"table": {"rows": torch.full((2,), float(dist.get_rank()))}}


class OwnHook(Callback):
    """User code that changes one bit of one weight on rank 1, after the third step."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.net[0].bias.view(torch.int32)[2] ^= 1


class Masked(Host):
    """Has a boolean mask, which on rank 1 is another one, and statistics of each rank's data."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.net[0].register_buffer("mask", torch.ones(3, dtype=torch.bool))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.net[0].mask[1] = dist.get_rank() == 0


CALLBACKS = {
    "drifts": lambda: [SAM(0.1), Drifts()],
    "gradient": lambda: [SAM(0.1), DriftsByGradient()],
    "state": lambda: [StateDrifts(), SAM(0.1)],
    "own": lambda: [OwnHook()],
    "own_and_sam": lambda: [OwnHook(), SAM(0.1)],
    "nothing": list,
}


def message(callbacks: str, host: str = "plain", every: int = 1, max_epochs: int = 2) -> str:
    """What the guard says on this rank; empty if it says nothing."""
    hosts = {"plain": Host, "norm": lambda: Host(batch_norm=True), "masked": Masked}
    module: nn.Module = hosts[host]()
    run = rank_trainer(
        callbacks=CALLBACKS[callbacks](),
        max_epochs=max_epochs,
        strategy=RegularizedDDPStrategy(guard_every_n_steps=every),
    )
    try:
        run.fit(module, loader(8))
    except ReplicaError as error:
        return str(error)
    assert torch.isfinite(weights(module)).all()
    return ""


def tripped_by_the_catalogue() -> dict[str, str]:
    """What the guard says while each technique trains the host of its contract case."""
    found: dict[str, str] = {}
    for name, subject in subjects().items():
        strategy = RegularizedDDPStrategy(guard_every_n_steps=1)
        try:
            run = subject.run(distributed=True, trainer={"strategy": strategy})
            assert run.trainer.strategy is strategy
            run.go()
        except ReplicaError as error:
            found[name] = str(error)
    return found


def subjects() -> dict[str, Subject]:
    """Every technique that acts in a fit, with its contract case."""
    classes = {cls.__name__: cls for cls in catalogue.techniques()}
    modules = pkgutil.iter_modules(cases.__path__, f"{cases.__name__}.")
    found: dict[str, Any] = {}
    for info in modules:
        found |= importlib.import_module(info.name).CASES
    return {
        name: Subject(classes[name], case)
        for name, case in found.items()
        if name in classes and case.stage == "fit"
    }
