"""Counts the collectives that techniques add to a step."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_reg import (
    SAM,
    AdversarialTraining,
    ConfidencePenalty,
    Cutout,
    EarlyLearning,
    EntropyPenalty,
    JacobianPenalty,
    LabelSmoothing,
    LogitAttenuatingWeightNorm,
    Mixout,
    NormLoss,
    OrthogonalRegularizer,
    OrthoGrad,
    PreviousTaskAnchor,
    VonNeumannEntropy,
)
from lightning_reg.engine import IndexedDataset
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host

# Every function of torch.distributed that techniques could call. DDP's own reductions are not
# among them: they start in C++.
FUNCTIONS = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)


class Flat(Host):
    """The host on its vectors as images of one row, which techniques on images take as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


class Count(Callback):
    """The collectives of each step: in forward, in backward, and behind it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.steps: list[dict[str, list[str]]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.calls.clear()
        self.steps.append({})

    def on_before_backward(self, *args: Any) -> None:
        self._close("forward")

    def on_after_backward(self, *args: Any) -> None:
        self._close("backward")

    def on_train_batch_end(self, *args: Any) -> None:
        self._close("after")

    def watch(self, stack: ExitStack) -> None:
        """Wrap every function while the stack is open."""
        for name in FUNCTIONS:
            original = getattr(dist, name)
            stack.enter_context(mock.patch.object(dist, name, self._counted(name, original)))

    def _counted(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return original(*args, **kwargs)

        return call

    def _close(self, phase: str) -> None:
        self.steps[-1].setdefault(phase, []).extend(self.calls)
        self.calls.clear()


def ten() -> list[Callback]:
    """Ten techniques, of nine mechanisms."""
    return [
        NormLoss(0.01),
        OrthogonalRegularizer(0.01),
        ConfidencePenalty(0.1),
        EntropyPenalty(0.1),
        JacobianPenalty(0.1),
        LabelSmoothing(0.1),
        Cutout(length=1),
        Mixout(0.1),
        OrthoGrad(),
        LogitAttenuatingWeightNorm(0.5),
    ]


SETS: dict[str, Any] = {
    "none": list,
    "ten": ten,
    "second_pass": lambda: [ConfidencePenalty(0.1), EntropyPenalty(0.1), SAM(0.1)],
    "attack": lambda: [ConfidencePenalty(0.1), AdversarialTraining(epsilon=0.1, steps=2)],
    "gathered": lambda: [ConfidencePenalty(0.1), VonNeumannEntropy(0.1, layer="net.0")],
    "table": lambda: [EarlyLearning(3.0), ConfidencePenalty(0.1)],
    "weights": lambda: [NormLoss(0.01), PreviousTaskAnchor(0.1)],
}


def count(techniques: str, strategy: str, log_every_n_steps: int) -> list[dict[str, list[str]]]:
    """The collectives of each of three steps."""
    counter = Count()
    data: Any = torch.utils.data.TensorDataset(INPUTS.view(-1, 1, 1, 8), LABELS)
    if techniques == "table":
        data = IndexedDataset(data)
    callbacks = SETS[techniques]()
    run = rank_trainer(
        strategy=strategy,
        callbacks=[*callbacks, counter],
        max_steps=3,
        log_every_n_steps=log_every_n_steps,
    )
    with ExitStack() as stack:
        counter.watch(stack)
        run.fit(Flat(), torch.utils.data.DataLoader(data, batch_size=8))
    return counter.steps
