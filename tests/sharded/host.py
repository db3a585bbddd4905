"""Hosts of the contract whose weights FSDP2 shards, and runs to compare with those under DDP."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_reg.engine import sharding
from lightning_reg.testing.runs import SEED, Setting, quiet
from lightning_reg.testing.snapshot import numbers_of
from lightning_reg.testing.subject import PLAIN, Subject


class ChildrenAndRoot:
    """Shards the children of a module by themselves, and what is left with the module."""

    def configure_model(self):
        """Once: Lightning may call it again."""
        if any(isinstance(p, DTensor) for p in self.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for part in self.parts():
            if next(part.parameters(), None) is not None:
                fully_shard(part, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def parts(self):
        """What is sharded by itself."""
        return list(self.children())


class RootOnly(ChildrenAndRoot):
    """All weights in one group, which stay whole from the module's forward to its backward."""

    def parts(self):
        return []


class HeadLeftOut(ChildrenAndRoot):
    """Shards a part of what learns."""

    def configure_model(self):
        fully_shard(self.encoder, mesh=self.device_mesh["data_parallel"])


class HeldThroughTheStep(ChildrenAndRoot):
    """Whole weights stay until the next step begins, which saves gathers."""

    def configure_model(self):
        super().configure_model()
        for part in self.modules():
            if isinstance(part, FSDPModule):
                part.set_reshard_after_backward(False, recurse=False)

    def on_train_batch_start(self, batch, batch_idx):
        reshard(self)


class EveryLayer(ChildrenAndRoot):
    """A group a layer, so that a group is called by one that is sharded too."""

    def parts(self):
        layers = [m for m in self.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        return [*layers, *(child for child in self.children() if child not in layers)]


def sharded(module, layout=ChildrenAndRoot):
    """The same module, sharded when Lightning configures it."""
    base = type(module)
    module.__class__ = type(base.__name__, (layout, base), {})
    return module


@dataclass
class Trained:
    """What a run leaves.

    Attributes:
        weights: every parameter as one process would hold it.
        logs: what the technique logged.
        state: the tensors of its state at the end of training.
        placements: how parameters were sharded.
        patched: attributes that the technique left in the module.
        steps: training steps that the host saw.
        error: the class, the words and the cure of the error that ended it.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    logs: dict[str, float] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    placements: set[str] = field(default_factory=set)
    patched: set[str] = field(default_factory=set)
    steps: int = 0
    error: tuple[str, str] | None = None


@dataclass(frozen=True)
class Way:
    """How to train.

    Args:
        shard: the layout under FSDP2; ``None`` trains replicas under DDP.
        setting: of the contract.
        changes: to the case's arguments.
        strategy: arguments of the strategy.
        trainer: further settings of the Trainer.
        others: makes further callbacks.
        group: numbers in the weights that are gathered together.
    """

    shard: type | None = ChildrenAndRoot
    setting: Setting = PLAIN
    changes: Mapping[str, Any] = field(default_factory=dict)
    strategy: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    others: Callable[[], Sequence[Callback]] = tuple
    group: int = sharding.LARGEST_GROUP


def train(ranks, cls, case, way):
    """The outcome of a technique's run on each of two ranks."""
    case = replace(case, expected=None, gradcheck=None, bad=(), bad_late=())
    job = pickle.dumps((cls, case, way))
    return [pickle.loads(answer) for answer in ranks.run(_train, job)]


def _train(job):
    cls, case, way = pickle.loads(job)
    subject = Subject(cls, case)
    module = subject.module(way.setting.options, **way.changes)
    setting = way.setting
    if way.shard is not None:
        module = sharded(module, way.shard)
        setting = replace(setting, strategy=_strategy(way.strategy))
    before = set(vars(module))
    run = subject.run(
        setting,
        module=module,
        changes=way.changes,
        after=way.others(),
        distributed=True,
        trainer=way.trainer,
    )
    result = Trained()
    torch.manual_seed(SEED)
    try:
        with quiet(), patch.object(sharding, "LARGEST_GROUP", way.group):
            if run.stage == "test":
                run.trainer.test(module, run.loader, verbose=False)
            else:
                run.trainer.fit(module, run.loader)
    except Exception as error:
        result.error = (type(error).__name__, str(error))
    result.weights = whole_weights(module)
    result.logs = {k: float(v) for k, v in run.trainer.callback_metrics.items() if "reg/" in k}
    result.placements = {str(p.placements) for p in module.parameters() if isinstance(p, DTensor)}
    result.patched = {"training_step", "configure_model"} & (set(vars(module)) - before)
    result.steps = len(module.seen)
    result.state = numbers_of(run._keeper.state)
    return pickle.dumps(result)


def reshard(module):
    """Let the module hold what the optimizer does."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole_weights(module):
    """Every parameter as one process would hold it."""
    reshard(module)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


def _strategy(settings):
    size = torch.distributed.get_world_size()
    defaults = {"data_parallel_size": size, "tensor_parallel_size": 1}
    return ModelParallelStrategy(**{**defaults, **settings})


class SaveAfterFirstEpoch(Callback):
    """Writes one checkpoint in the middle of a run."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def resume(ranks, cls, case, folder):
    """Weights and states of a run over two epochs, and of one that goes on after the first."""
    case = replace(case, expected=None, gradcheck=None, bad=(), bad_late=())
    job = pickle.dumps((cls, case, f"{folder}/first.ckpt"))
    return [pickle.loads(answer) for answer in ranks.run(_resume, job)]


def _resume(job):
    cls, case, path = pickle.loads(job)
    subject = Subject(cls, case)

    def fit(*callbacks, **settings):
        setting = Setting(epochs=2, strategy=_strategy({"save_distributed_checkpoint": False}))
        module = sharded(subject.module(setting.options))
        run = subject.run(setting, module=module, after=callbacks, distributed=True)
        torch.manual_seed(SEED)
        with quiet():
            run.trainer.fit(module, run.loader, **settings)
        return run

    whole = fit(SaveAfterFirstEpoch(path))
    resumed = fit(ckpt_path=path)
    states = [run.technique.state_dict() for run in (whole, resumed)]
    return pickle.dumps((whole_weights(whole.module), whole_weights(resumed.module), states))
