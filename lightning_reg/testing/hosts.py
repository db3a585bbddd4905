"""Tiny deterministic modules for the contract to train techniques on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_reg.testing.host import (
    BATCH,
    CLASSES,
    SAMPLES,
    ContractHost,
    HostFailure,
    HostOptions,
    SampleCount,
    TensorItems,
    indexed,
    recorded,
)

__all__ = [
    "BATCH",
    "CLASSES",
    "SAMPLES",
    "AutoencoderHost",
    "ClassifierHost",
    "ContractHost",
    "DictBatchHost",
    "HostFailure",
    "HostOptions",
    "ImageHost",
    "RegressorHost",
    "SampleCount",
    "SeveralLossesHost",
    "TensorItems",
    "indexed",
    "recorded",
]


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
