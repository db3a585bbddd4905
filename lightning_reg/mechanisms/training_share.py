"""The training data once more, in order, each sample on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, IterableDataset

from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.errors import UnsupportedError


class TrainingShare:
    """The batches of a rank's share of the training set; the run's own loader is not touched.

    Samples are dealt to ranks without repeating any, so ranks may have unequal numbers. The
    DataLoader draws from the global random generator, as do augmentations: restore it.

    Args:
        owner: the technique, for the message.
        trainer: the Trainer of the run.
        comm: the ranks.
        why: what the data is needed for, as the message says it.
        cure: a line of code that does without.

    Attributes:
        fewest: the number of batches of the rank that has the fewest.

    Raises:
        UnsupportedError: if the training data cannot be gone through a second time.
    """

    def __init__(
        self, owner: object, trainer: pl.Trainer, comm: Communicator, why: str, cure: str
    ) -> None:
        loader = trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        whole = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
        if dataset is None or not whole:
            raise UnsupportedError(
                owner,
                f"{why}, for which it needs one DataLoader with a map-style dataset; this run has "
                f"{type(loader).__name__}",
                cure=cure,
            )
        size = getattr(loader, "batch_size", None) or 32
        self.fewest = -(-(len(dataset) // comm.world_size) // size)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=size,
            sampler=range(comm.rank, len(dataset), comm.world_size),
            collate_fn=loader.collate_fn,  # type: ignore[union-attr]
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


__all__ = ["TrainingShare"]
