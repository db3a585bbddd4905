"""The small ResNet and the small transformer that step times are measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH = 32


class Classifier(L.LightningModule):
    """Cross-entropy of ten classes with SGD on 32 x 32 images.

    Args:
        encoder: features (B, width) from images (B, 3, 32, 32).
        width: of the features.
    """

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        logits: Tensor = self.head(self.dropout(self.encoder(x)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Block(nn.Module):
    """Two convolutions and a shortcut.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return F.relu(self.body(x) + self.shortcut(x))


class Tokens(nn.Module):
    """Three encoder layers over 32 tokens of a row of pixels each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0)
        self.embed = nn.Linear(96, width)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, width) of images (B, 3, 32, 32)."""
        mixed: Tensor = self.layers(self.embed(x.permute(0, 2, 1, 3).flatten(2)))
        return mixed.mean(1)


def resnet(make: Callable[..., Classifier] = Classifier) -> Classifier:
    """Three residual blocks (160 k parameters)."""
    blocks = [Block(3, 24, 2), Block(24, 48, 2), Block(48, 96, 2)]
    return make(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 96)


def transformer(make: Callable[..., Classifier] = Classifier) -> Classifier:
    """Three transformer layers (157 k parameters)."""
    return make(Tokens(64), 64)


MODELS = {"resnet": resnet, "transformer": transformer}


def images(wrap: Callable[[Any], Any] | None = None) -> DataLoader[Any]:
    """A loader of random images in batches of 32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * 16, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (len(x),), generator=generator)
    data: Any = TensorDataset(x, y)
    return DataLoader(data if wrap is None else wrap(data), batch_size=BATCH)
