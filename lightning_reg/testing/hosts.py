"""Tiny deterministic modules for the contract to train techniques on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
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
        loss, signals = self.compute(self._poisoned(batch, batch_idx))
        self._count(batch, signals["logits"])
        self.seen.append((loss.detach().clone(), signals["logits"].detach().clone()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum: a wrong gradient shows, and stays."""
        weights = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(weights, self.options.lr, momentum=0.9)

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


class ClassifierHost(ContractHost):
    """A small classifier on vectors: ``encoder`` (8 to 16) and ``head`` (16 to 4)."""

    omits = ContractHost.omits | {"inputs", "targets", "logits"}

    def build(self, options: HostOptions) -> None:
        """A layer, a head, and what the options add."""
        norm = nn.BatchNorm1d(16) if options.batch_norm else nn.Identity()
        self.encoder = nn.Sequential(nn.Linear(8, 16), norm, nn.Tanh())
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 4)."""
        logits: Tensor = self.head(self.dropout(self.encoder(x)))
        return logits

    def compute(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Cross-entropy."""
        x, y = self.split(batch)
        if self.options.omit == "logits":
            # Around every hook: nothing that the step calls can be captured.
            hidden = self.dropout.forward(self.encoder.forward(x))
            logits = self.head.forward(hidden)
        else:
            logits = self(x)
        loss = logits.logsumexp(1).mean() if y is None else F.cross_entropy(logits, y)
        return loss, {"logits": logits, "inputs": x, "targets": y}

    def split(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Inputs and labels of a batch."""
        if self.options.omit == "inputs":
            return batch["first"], batch["second"]
        if self.options.omit == "targets":
            return batch[0], None
        x, y = batch
        return x, y

    @staticmethod
    def dataset(options: HostOptions) -> Dataset[Any]:
        """Vectors with labels that a linear map of them gives."""
        return _with_labels(_inputs(8), options)


class ImageHost(ClassifierHost):
    """A small convolutional classifier on images (1, 8, 8): ``stem``, ``encoder``, ``head``."""

    def build(self, options: HostOptions) -> None:
        """A convolution, a layer and a head."""
        norm = nn.BatchNorm2d(4) if options.batch_norm else nn.Identity()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), norm, nn.Tanh())
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 4)."""
        logits: Tensor = self.head(self.dropout(self.encoder(self.stem(x))))
        return logits

    def compute(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Cross-entropy."""
        if self.options.omit != "logits":
            return super().compute(batch)
        x, y = self.split(batch)
        hidden = self.encoder.forward(self.stem.forward(x))
        logits = self.head.forward(self.dropout.forward(hidden))
        assert y is not None
        return F.cross_entropy(logits, y), {"logits": logits, "inputs": x, "targets": y}

    @staticmethod
    def dataset(options: HostOptions) -> Dataset[Any]:
        """Images of noise with labels."""
        return _with_labels(_inputs(64).view(SAMPLES, 1, 8, 8), options)


class DictBatchHost(ClassifierHost):
    """A classifier whose batch is a dict with ``x``, ``y`` and ``domain`` (two domains)."""

    omits = ContractHost.omits | {"inputs", "targets", "logits", "domain"}

    def split(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Inputs and labels of a batch."""
        if self.options.omit == "inputs":
            return batch["first"], batch["second"]
        return batch["x"], batch.get("y")

    @staticmethod
    def dataset(options: HostOptions) -> Dataset[Any]:
        """Vectors, labels and domains."""
        x = _inputs(8)
        y, domain = _labels(x), torch.arange(SAMPLES) % 2
        if options.omit == "inputs":
            return TensorItems(("first", "second", "domain"), x, y, domain)
        if options.omit == "targets":
            return TensorItems(("x", "domain"), x, domain)
        if options.omit == "domain":
            return TensorItems(("x", "y"), x, y)
        return TensorItems(("x", "y", "domain"), x, y, domain)


class RegressorHost(ClassifierHost):
    """The classifier's network with a squared loss on four float targets."""

    omits = ContractHost.omits | {"inputs", "targets"}

    def compute(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Mean squared error."""
        x, y = self.split(batch)
        prediction = self(x)
        loss = prediction.square().mean() if y is None else F.mse_loss(prediction, y)
        return loss, {"logits": prediction, "inputs": x, "targets": y}

    @staticmethod
    def dataset(options: HostOptions) -> Dataset[Any]:
        """Vectors with a smooth function of them."""
        x = _inputs(8)
        y = torch.sin(x[:, :CLASSES] + x[:, CLASSES:])
        if options.omit == "targets":
            return TensorItems(None, x)
        keys = ("first", "second") if options.omit == "inputs" else None
        return TensorItems(keys, x, y)


class AutoencoderHost(ContractHost):
    """An autoencoder on vectors: ``encoder`` (8 to 3) and ``decoder`` (3 to 8)."""

    omits = ContractHost.omits | {"inputs"}

    def build(self, options: HostOptions) -> None:
        """Two layers."""
        norm = nn.BatchNorm1d(3) if options.batch_norm else nn.Identity()
        self.encoder = nn.Sequential(nn.Linear(8, 3), norm, nn.Sigmoid())
        self.dropout = nn.Dropout(options.dropout)
        self.decoder = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction (B, 8)."""
        reconstruction: Tensor = self.decoder(self.dropout(self.encoder(x)))
        return reconstruction

    def compute(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Mean squared error of the reconstruction."""
        x = batch["first"] if self.options.omit == "inputs" else batch[0]
        reconstruction = self(x)
        loss = F.mse_loss(reconstruction, x)
        return loss, {"logits": reconstruction, "inputs": x}

    @staticmethod
    def dataset(options: HostOptions) -> Dataset[Any]:
        """Vectors alone."""
        return TensorItems(("first",) if options.omit == "inputs" else None, _inputs(8))


class SeveralLossesHost(ClassifierHost):
    """A classifier whose loss is the cross-entropy plus an activity term."""

    omits = ContractHost.omits | {"inputs", "targets"}

    def compute(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Two losses."""
        x, y = self.split(batch)
        hidden = self.encoder(x)
        logits = self.head(self.dropout(hidden))
        entropy = logits.logsumexp(1).mean() if y is None else F.cross_entropy(logits, y)
        loss = entropy + 0.1 * hidden.square().mean()
        return loss, {"logits": logits, "inputs": x, "targets": y}


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


def _inputs(width: int) -> Tensor:
    return torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(1))


def _labels(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    mapping = torch.randn(flat.shape[1], CLASSES, generator=torch.Generator().manual_seed(2))
    return (flat @ mapping).argmax(1)


def _with_labels(x: Tensor, options: HostOptions) -> Dataset[Any]:
    if options.omit == "targets":
        return TensorItems(None, x)
    keys = ("first", "second") if options.omit == "inputs" else None
    return TensorItems(keys, x, _labels(x))
