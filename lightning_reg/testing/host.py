"""The base of modules that the contract trains techniques on, and its variants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric

from lightning_reg.engine.manual import RegularizeMixin
from lightning_reg.engine.memory import IndexedDataset

CLASSES = 4
SAMPLES = 32
BATCH = 8


@dataclass(frozen=True)
class HostOptions:
    """A variant of a host.

    Args:
        dropout: the probability of a dropout layer in front of the head.
        batch_norm: whether the encoder has a BatchNorm.
        manual: optimize manually, with ``self.regularize`` before the backward.
        omit: a signal that cannot be found: ``"logits"``, ``"targets"``, ``"inputs"``,
            ``"domain"``, ``"sample_index"``.
        fail_at: the training step (from 0) that raises :class:`HostFailure`.
        fail_call: which run of that step raises: 1 is the second pass of a technique that has
            one.
        nan_at: the training step whose inputs are NaN.
        nan_rank: the only rank that gets them; all by default.
        lr: the learning rate.
        fused: a fused optimizer, which gets gradients that still carry the scale of fp16.
    """

    dropout: float = 0.0
    batch_norm: bool = False
    manual: bool = False
    omit: str | None = None
    fail_at: int | None = None
    fail_call: int = 0
    nan_at: int | None = None
    nan_rank: int | None = None
    lr: float = 0.1
    fused: bool = False


class HostFailure(RuntimeError):
    """Raised by a host on purpose."""


class SampleCount(Metric):
    """Counts samples and right answers: shows an update that is lost or made twice."""

    full_state_update = False
    samples: Tensor
    correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count one batch."""
        self.samples += len(targets)
        self.correct += (predictions == targets).sum()

    def compute(self) -> Tensor:
        """The share of right answers."""
        return self.correct / self.samples


class TensorItems(Dataset[Any]):
    """Samples of fixed tensors, as tuples or as dicts."""

    def __init__(self, keys: tuple[str, ...] | None, *tensors: Tensor) -> None:
        self.keys = keys
        self.tensors = tensors

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        """One sample."""
        values = tuple(t[index] for t in self.tensors)
        return values if self.keys is None else dict(zip(self.keys, values, strict=True))


class ContractHost(RegularizeMixin, pl.LightningModule):
    """Base of hosts: a subclass builds its network and computes its loss.

    Each training step logs ``loss`` and counts its samples in ``counted``. Losses and logits
    of the steps are kept in ``seen`` for the checks.

    Args:
        options: the variant.

    Attributes:
        omits: the signals that ``HostOptions.omit`` can take away from this host.
    """

    omits: ClassVar[frozenset[str]] = frozenset({"sample_index"})

    def __init__(self, options: HostOptions | None = None) -> None:
        super().__init__()
        self.options = options = options if options is not None else HostOptions()
        self.automatic_optimization = not options.manual
        self.counted = SampleCount()
        # Fixed weights without touching the global generator, whose state the checks compare.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.build(options)
            self.unused = nn.Linear(2, 2).requires_grad_(False)
        self.seen: list[tuple[Tensor, Tensor]] = []
        self._calls = 0

    def build(self, options: HostOptions) -> None:
        """Make the submodules; the random seed is fixed."""
        raise NotImplementedError

    def compute(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a batch, and the signals for ``self.regularize``: ``logits`` at least."""
        raise NotImplementedError

    @staticmethod
    def dataset(options: HostOptions) -> Dataset[Any]:
        """The training set."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step of any host."""
        options = self.options
        if options.fail_at == self.trainer.global_step:
            self._calls += 1
            if self._calls > options.fail_call:
                raise HostFailure("the host fails in this step, as it was told to")
        with recorded(self) if options.manual else nullcontext() as features:
            loss, signals = self.compute(self._poisoned(batch, self.trainer.global_step))
        self.log("loss", loss, prog_bar=False)
        self.seen.append((loss.detach().clone(), signals["logits"].detach().clone()))
        self._count(batch, signals["logits"])
        if options.manual:
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            given = {"features": features, **signals}
            self.manual_backward(self.regularize(loss, **given))
            optimizer.step()  # type: ignore[union-attr]
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Keep what the network says."""
        if self.options.fail_at == batch_idx:
            raise HostFailure("the host fails in this step, as it was told to")
        loss, signals = self.compute(self._poisoned(batch, batch_idx))
        self._count(batch, signals["logits"])
        self.seen.append((loss.detach().clone(), signals["logits"].detach().clone()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum: a wrong gradient shows, and stays."""
        weights = [p for p in self.parameters() if p.requires_grad]
        options = self.options
        return torch.optim.SGD(weights, options.lr, momentum=0.9, fused=options.fused)

    def _count(self, batch: Any, logits: Tensor) -> None:
        labels = logits.detach().flatten(1).argmax(1)
        self.counted.update(labels, labels)

    def _poisoned(self, batch: Any, step: int) -> Any:
        options = self.options
        if options.nan_at != step or options.nan_rank not in (None, self.trainer.global_rank):
            return batch
        nan = float("nan")
        if isinstance(batch, dict):
            return {k: v * nan if v.is_floating_point() else v for k, v in batch.items()}
        if isinstance(batch, Tensor):
            return batch * nan
        return tuple(v * nan if v.is_floating_point() else v for v in batch)


@contextmanager
def recorded(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The outputs of submodules by name, while the context is open; of several calls the last."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(part: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    handles = [p.register_forward_hook(keep(name)) for name, p in module.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def indexed(dataset: Dataset[Any], options: HostOptions) -> Dataset[Any]:
    """The dataset with positions, unless the variant leaves them out."""
    return dataset if options.omit == "sample_index" else IndexedDataset(dataset)
