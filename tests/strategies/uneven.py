"""Ranks with batches of unequal size, one of which has no label that counts."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_reg import SAM
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.regularizer import CRITERION_PHASES, Regularizer, overrides
from lightning_reg.engine.step import Step
from lightning_reg.mechanisms.output_penalty import OutputPenalty
from lightning_reg.testing.runs import Outcome, Setting
from lightning_reg.testing.subject import Subject
from tests.strategies.drift import subjects

# By rank: the samples of the first and of the second batch.
BATCHES = [
    [[*range(8)], [*range(8, 16)]],
    [[*range(16, 24)], [*range(24, 27)]],
]
JOINT = [first + second for first, second in zip(*BATCHES, strict=True)]
WITHOUT_LABEL = [3, *BATCHES[1][0], 25]
SETTING = Setting(precision="64-true")


class Unlabelled(Dataset[Any]):
    """Samples of which some have the label that losses ignore."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        item = self.inner[index]
        if isinstance(item, tuple) and len(item) == 2 and not item[1].is_floating_point():
            x, y = item
            return x, (torch.full_like(y, -100) if index in WITHOUT_LABEL else y)
        return item


class Finite(Callback):
    """The loss that the Trainer differentiates is a number on every rank."""

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        assert outputs["loss"].isfinite(), "a loss over no label is not 0"


def guarded(base: type, scale: float) -> type:
    """A host whose loss is 0 where no label counts, and has its gradient scaled."""

    class Guarded(base):  # type: ignore[misc, valid-type]
        def compute(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
            loss, signals = super().compute(batch)
            loss = loss.nan_to_num()
            return loss.detach() + scale * (loss - loss.detach()), signals

    return Guarded


def changes_the_loss(technique: Any) -> bool:
    """Whether the user's loss is computed again, a mean over each rank's own labels."""
    return any(overrides(technique, phase) for phase in CRITERION_PHASES)


def chosen() -> dict[str, Subject]:
    """Callbacks that claim to be global and act on the loss, in a fit."""
    found = {}
    for name, subject in subjects().items():
        technique = subject.technique()
        acts = isinstance(technique, Regularizer) and (
            changes_the_loss(technique) or overrides(technique, "penalty")
        )
        if acts and not subject.manual and subject.cls.semantics == "global":
            found[name] = subject
    return found


def train(subject: Subject, rank: int | None, beside: Sequence[Callback] = ()) -> Outcome:
    """Two steps on a rank, or in one process on the joint batches, beside other callbacks.

    Penalties are alone: the user's own loss, a mean on each rank, is not that of joint batches.
    """
    inner = subject.case.dataset or (lambda data: data)
    # A table of all samples takes none without a label: refused.
    wrap = (lambda data: data) if subject.indexed else Unlabelled
    case = replace(subject.case, dataset=lambda data: wrap(inner(data)))
    subject = Subject(subject.cls, case)
    alone = not changes_the_loss(subject.technique())
    batches = JOINT if rank is None else BATCHES[rank]
    return subject.run(
        SETTING,
        changes=case.joint,
        module=guarded(case.host, 0.0 if alone else 1.0)(SETTING.options),
        loader=lambda data, **_: DataLoader(data, batch_sampler=batches),
        after=[Finite(), *beside],
        distributed=rank is not None,
        trainer={"use_distributed_sampler": False},
    ).go()


def on_rank() -> bytes:
    """On a rank: what each technique trains."""
    rank = torch.distributed.get_rank()
    return pickle.dumps({name: train(subject, rank) for name, subject in chosen().items()})


class Gated(OutputPenalty):
    """Rows weigh what the model makes of them, in each pass anew."""

    def values(self, logits: Tensor) -> Tensor:
        return logits.square().sum(1)

    def penalty(self, step: Step) -> JointMean:
        rows = self._rows(step.logits, step.find("targets"))
        return JointMean.of(self.values(rows), rows.softmax(1).amax(1))


def twice_on_rank(gated: bool) -> bytes:
    """On a rank: what a penalty trains that counts in both passes over the batch."""
    return pickle.dumps(twice(gated, torch.distributed.get_rank()))


def twice(gated: bool, rank: int | None) -> Outcome:
    """A penalty whose gradient is taken where its own gradient over all ranks points to."""
    beside = [Gated(1.0)] if gated else []
    return train(subjects()["EntropyPenalty"], rank, [*beside, SAM(0.5, sharpness="global")])
