"""Tables that remember something about each sample of the training set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from lightning_reg.engine.communicator import gather_together
from lightning_reg.engine.errors import ArgumentError


class IndexedSample(NamedTuple):
    """A sample, or a batch of them, with its position in the dataset.

    Collation, device transfer and pinning keep named tuples, so a batch of these is one of them.
    """

    sample: Any
    index: Any


class IndexedDataset(Dataset[IndexedSample]):
    """A dataset whose samples know their position; the user's training step does not notice.

    The pipeline takes the position off each batch before ``training_step`` sees it. Whatever else
    the wrapped dataset offers (``classes``, ``transform``) is reached through the wrapper.

    Args:
        dataset: a map-style dataset.

    Raises:
        ArgumentError: if ``dataset`` has no positions (an ``IterableDataset``).

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> IndexedDataset(TensorDataset(torch.tensor([3.0, 4.0])))[1]
        IndexedSample(sample=(tensor(4.),), index=1)
    """

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ArgumentError(
                self,
                f"needs a map-style dataset, whose samples have positions; "
                f"{type(dataset).__name__} is iterated over",
                cure="give the dataset `__getitem__` and `__len__`",
            )
        self.dataset = dataset

    def __getitem__(self, index: int) -> IndexedSample:
        """The sample at ``index``, and ``index``."""
        return IndexedSample(self.dataset[index], self._position(index))

    def __getitems__(self, indices: Sequence[int]) -> list[IndexedSample]:
        """Several samples; loaders ask for whole batches where a dataset offers it."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if callable(fetch) else [self.dataset[i] for i in indices]
        pairs = zip(samples, indices, strict=True)
        return [IndexedSample(sample, self._position(i)) for sample, i in pairs]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Pickle and copy ask for special names before `dataset` exists.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @staticmethod
    def collate(collate_fn: Callable[[list[Any]], Any]) -> Callable[[list[Any]], IndexedSample]:
        """The loader's ``collate_fn`` for a dataset that has one of its own."""
        return _IndexedCollate(collate_fn)

    def _position(self, index: int) -> int:
        # -1 and len - 1 are one sample and must be one row.
        index = int(index)
        return index + len(self) if index < 0 else index


class _IndexedCollate:
    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, samples: list[IndexedSample]) -> IndexedSample:
        batch = self._collate_fn([s.sample for s in samples])
        return IndexedSample(batch, default_collate([s.index for s in samples]))


def take_index(batch: Any) -> tuple[Any, Tensor | None]:
    """The batch as the user knows it, and the positions of its samples if they are known."""
    if isinstance(batch, IndexedSample):
        return batch.sample, torch.as_tensor(batch.index).reshape(-1)
    return batch, None


class Gatherer(Protocol):
    """What a table needs of a communicator."""

    @property
    def rank(self) -> int:
        """This process."""

    @property
    def world_size(self) -> int:
        """The number of processes."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks, by rank; ranks may have different numbers of rows."""


class SampleMemory:
    """A table with one row per sample of the training set, the same on all ranks.

    Under DDP the sampler moves samples between ranks from epoch to epoch, so every write goes to
    every rank's table: a table is bit for bit what one process would have.

    Args:
        num_samples: the length of the training set.
        width: the numbers per sample.
        dtype: of the table.
        fill: what a row holds before it is first written.
        comm: where the other ranks are; ``None`` for one process.

    Attributes:
        table: (num_samples, width).
        seen: (num_samples,) bool, whether a row has been written.

    Raises:
        ArgumentError: if a size is not a positive whole number; on use, if an index lies outside
            the table, if shapes do not fit, or if loaded tensors have another size.
    """

    def __init__(
        self,
        num_samples: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        *,
        fill: float = 0.0,
        comm: Gatherer | None = None,
    ) -> None:
        for name, size in (("num_samples", num_samples), ("width", width)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ArgumentError(
                    self,
                    f"`{name}` must be a whole number from 1, got {size!r}",
                    cure="SampleMemory(num_samples=len(dataset), width=num_classes)",
                )
        self.comm = comm
        self.table = torch.full((num_samples, width), fill, dtype=dtype)
        self.seen = torch.zeros(num_samples, dtype=torch.bool)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.table)

    @property
    def width(self) -> int:
        """The numbers per sample."""
        return self.table.shape[1]

    def to(self, device: torch.device | str) -> SampleMemory:
        """Move the table."""
        self.table = self.table.to(device)
        self.seen = self.seen.to(device)
        return self

    def read(self, index: Tensor) -> Tensor:
        """A copy of the rows (B, width) at ``index`` (B,), without a gradient."""
        self._check_index(index)
        return self.table[index.to(self.table.device)]

    def write(
        self,
        index: Tensor,
        rows: Tensor,
        mask: Tensor | None = None,
        comm: Gatherer | None = None,
    ) -> None:
        """Write this micro-batch's rows, of all ranks; every rank has to call it.

        A sample that occurs twice gets its first row, in the order of the joint batch. Rows with
        a number that is not finite are dropped.

        Args:
            index: (B,) positions in the dataset.
            rows: (B, width); detached here.
            mask: (B,) True where nothing is to be written: ``step.padding``.
            comm: used in place of the table's own.
        """
        index, rows = index.reshape(-1), rows.detach()
        wrong = self._wrong_shape(index, rows, mask)
        comm = comm if comm is not None else self.comm
        rank, world = (0, 1) if comm is None else (comm.rank, comm.world_size)
        if wrong and world == 1:
            raise wrong
        if wrong:
            # The other ranks wait in the gather: tell them with an index that none can have.
            index, rows, mask = index[:0].new_full((1,), -1), self._blank(rows), None
        self.to(rows.device)
        # A DistributedSampler deals position p of the epoch to rank p % world.
        position = torch.arange(len(index), device=rows.device) * world + rank
        skip = torch.zeros_like(position) if mask is None else mask.to(position)
        entries = torch.stack([index.to(position), position, skip], dim=1)
        rows = rows.to(self.table.dtype)
        if comm is not None and world > 1:
            entries, rows = gather_together(comm.gather, entries, rows)
        if wrong:
            raise wrong
        self._check_index(entries[:, 0])
        self._store(entries, rows)

    def state_dict(self) -> dict[str, Tensor]:
        """The table and what of it has been written."""
        return {"table": self.table.detach().cpu().clone(), "seen": self.seen.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a saved table.

        Raises:
            ArgumentError: if it was made for another dataset or width.
        """
        if state["table"].shape != self.table.shape:
            raise ArgumentError(
                self,
                f"the saved table holds {tuple(state['table'].shape)} numbers, this one "
                f"{tuple(self.table.shape)}: dataset or classes are not those of the checkpoint",
                cure="resume with the same training set",
            )
        self.table = state["table"].to(self.table)
        self.seen = state["seen"].to(self.seen)

    def _store(self, entries: Tensor, rows: Tensor) -> None:
        keep = (entries[:, 2] == 0) & torch.isfinite(rows).flatten(1).all(1)
        entries, rows = entries[keep], rows[keep]
        # By index, and for one index by position: the first of each run is the one that counts.
        order = torch.argsort(entries[:, 1], stable=True)
        order = order[torch.argsort(entries[order, 0], stable=True)]
        index = entries[order, 0]
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        self.table[index[first]] = rows[order[first]]
        self.seen[index[first]] = True

    def _wrong_shape(
        self, index: Tensor, rows: Tensor, mask: Tensor | None
    ) -> ArgumentError | None:
        fits = rows.shape == (len(index), self.width)
        if fits and (mask is None or mask.shape == index.shape):
            return None
        found = "" if mask is None else f" and a mask of {tuple(mask.shape)}"
        return ArgumentError(
            self,
            f"needs {len(index)} rows of {self.width} numbers for {len(index)} indices, got "
            f"{tuple(rows.shape)}{found}",
            cure="memory.write(index, rows, mask=step.padding)",
        )

    def _blank(self, rows: Tensor) -> Tensor:
        return torch.zeros(1, self.width, dtype=self.table.dtype, device=rows.device)

    def _check_index(self, index: Tensor) -> None:
        if len(index) == 0:
            return
        low, high = (int(v) for v in torch.aminmax(index))
        if low < 0 or high >= len(self):
            outside = low if low < 0 else high
            raise ArgumentError(
                self,
                f"index {outside} lies outside a table of {len(self)} samples; nothing was written",
                cure="num_samples=len(train_dataset), and IndexedDataset around that dataset",
            )
