"""The network that is trained when the user brings none."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallNet(pl.LightningModule):
    """A perceptron of two hidden layers, large enough to learn wrong labels by heart.

    Args:
        num_features: the pixels of an image.
        num_classes: the number of classes.
        width: of the hidden layers.
        lr: Adam's learning rate.
    """

    def __init__(
        self, num_features: int = 64, num_classes: int = 10, width: int = 256, lr: float = 1e-3
    ) -> None:
        super().__init__()
        self.lr = lr
        self.encoder = nn.Sequential(
            nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, pixels)."""
        logits: Tensor = self.head(self.encoder(x))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """A forward pass: the monitor does the rest."""
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), self.lr)
