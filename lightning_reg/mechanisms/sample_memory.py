"""Techniques that remember something about each sample of the training set.

A technique reads its micro-batch's rows with :meth:`SampleMemoryRegularizer.recall`, computes new
ones, and writes them with :meth:`SampleMemoryRegularizer.remember`, in whatever phase it acts. The
mechanism takes care of

- the table: as long as the training set of the run, as wide as the first rows;
- the index of each sample, which comes from an ``IndexedDataset``, and a clear error without one;
- ranks: every rank's rows are written to every rank's table, so that the table is what one
  process would have, although the sampler moves samples between ranks;
- samples that a DistributedSampler repeats to fill up the last batch: they do not count twice;
- second passes over a batch, which must not write again;
- rows that are not finite, which are dropped;
- the checkpoint, and the next fit: a run that starts from step 0 forgets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import (
    ArgumentError,
    IndexedDataset,
    ParameterUpdate,
    RegularizationError,
    Regularizer,
    SampleMemory,
    Schedule,
    Signals,
    Step,
)


class SampleTable:
    """A :class:`SampleMemory` that is made when the run shows how large it has to be.

    Args:
        owner: the technique, for messages.
        num_samples: the length of the training set; ``None`` takes it from the dataloader.
        width: the numbers per sample; ``None`` takes it from the first rows.
        fill: what a row holds before it is first written.
    """

    def __init__(
        self,
        owner: object,
        num_samples: int | None = None,
        width: int | None = None,
        fill: float = 0.0,
    ) -> None:
        for argument, value in (("num_samples", num_samples), ("num_classes", width)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise _bad_size(owner, argument, value)
            if value is not None and value < 1:
                raise _bad_size(owner, argument, value)
        self.owner = type(owner).__name__
        self.num_samples, self.width, self.fill = num_samples, width, fill
        self.memory: SampleMemory | None = None
        self._found: int | None = None
        self._loaded: dict[str, Tensor] | None = None

    def begin(self, trainer: pl.Trainer) -> None:
        """Start a run: with what was loaded, with what an earlier fit left, or with nothing."""
        if self._loaded is None and int(trainer.global_step) == 0:
            self.memory = None
        self._found = self.num_samples or training_set_size(trainer)

    def of(self, width: int) -> SampleMemory:
        """The table, for rows of ``width`` numbers."""
        if self.memory is None:
            self.memory = self._make(width)
        if self.memory.width != width:
            raise RegularizationError(
                self.owner,
                f"remembers {self.memory.width} numbers per sample, and this batch has {width}",
                cure=f"{self.owner}(num_classes={width})",
            )
        return self.memory

    def forget(self) -> None:
        """No row has been written."""
        if self.memory is not None:
            self.memory.seen.zero_()
        if self._loaded is not None:
            self._loaded = {**self._loaded, "seen": torch.zeros_like(self._loaded["seen"])}

    def state_dict(self) -> dict[str, Tensor]:
        """The table, if there is one."""
        if self._loaded is not None:
            return dict(self._loaded)
        return {} if self.memory is None else self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Keep a saved table until the run shows its size."""
        self.memory = None
        self._loaded = dict(state) or None

    def _make(self, width: int) -> SampleMemory:
        if self._found is None:
            raise ArgumentError(
                self.owner,
                "remembers each sample and cannot tell how many the training set has",
                cure=f"{self.owner}(num_samples=50_000)",
            )
        memory = SampleMemory(self._found, self.width or width, fill=self.fill)
        if self._loaded is not None:
            memory.load_state_dict(self._loaded)
            self._loaded = None
        return memory


class SampleMemoryRegularizer(Regularizer):
    """Base of techniques with a table that has one row per training sample.

    Args:
        strength: the multiplier. While a Schedule is at 0 the table is kept up to date.
        num_samples: the length of the training set; ``None`` takes it from the dataloader.
        width: the numbers per sample; ``None`` takes it from the first rows.
        fill: what a row holds before it is first written.
        signals: where the technique finds its tensors.
        name: the name in logs and checkpoints.
    """

    needs: ClassVar[tuple[str, ...]] = ("sample_index",)

    def __init__(
        self,
        strength: float | Schedule,
        *,
        num_samples: int | None = None,
        width: int | None = None,
        fill: float = 0.0,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        self.memory = SampleTable(self, num_samples, width, fill)
        self._recalled: WeakKeyDictionary[Step, Tensor] | None = None

    def recall(self, step: Step, width: int) -> Tensor:
        """The rows (B, width) of this micro-batch's samples, without a gradient.

        A second pass recalls what the first one did, whatever was written in between.
        """
        if self._recalled is None:
            self._recalled = WeakKeyDictionary()
        if step not in self._recalled:
            memory = self.memory.of(width).to(step.device)
            self._recalled[step] = memory.read(self._index(step))
        return self._recalled[step]

    def remember(self, step: Step, rows: Tensor) -> None:
        """Write rows (B, width) for this micro-batch.

        A sample that a DistributedSampler repeated is not written, nor is anything in a second
        pass.
        """
        memory = self.memory.of(rows.shape[1]).to(step.device)
        if not step.is_rerun:
            memory.write(self._index(step), rows, mask=step.padding, comm=step.comm)

    def remembered(self, step: Step, rows: Tensor) -> Tensor:
        """:meth:`remember`; returns what the table holds then, where nothing was written too."""
        self.remember(step, rows)
        return self.memory.of(rows.shape[1]).read(self._index(step))

    def active(self, context: Step | ParameterUpdate) -> bool:
        """A constant strength of 0 turns it off; a Schedule that passes 0 does not."""
        return isinstance(self.strength, Schedule) or context.strength(self) != 0

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the size of the training set."""
        self.memory.begin(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The table."""
        return {"memory": self.memory.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved table."""
        self.memory.load_state_dict(state_dict["memory"])

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to the steps of a run stays with it.
        return {**super().__getstate__(), "_recalled": None}

    def _index(self, step: Step) -> Tensor:
        index = step.sample_index
        # Asked for by name, an index that is not there is an error which says how to get one.
        found: Tensor = index if index is not None else step.given_signal("sample_index")
        return found.reshape(-1)


def training_set_size(trainer: pl.Trainer) -> int | None:
    """How many rows a table over the training set needs; ``None`` if that cannot be seen.

    A position counts within the dataset that an ``IndexedDataset`` wraps, so what matters is the
    length of that one, also where a ``Subset`` of it is trained on.
    """
    sizes = [_size(getattr(loader, "dataset", None)) for loader in _loaders(trainer)]
    return sizes[0] if len(sizes) == 1 else None


def _loaders(trainer: pl.Trainer) -> list[Any]:
    loaders = trainer.train_dataloader
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def _size(dataset: Any) -> int | None:
    inner = dataset
    while inner is not None and not isinstance(inner, IndexedDataset):
        inner = inner.__dict__.get("dataset") if hasattr(inner, "__dict__") else None
    if inner is None:
        inner = dataset
    if any(isinstance(part, IndexedDataset) for part in _parts(inner)):
        # Each of the joined datasets counts from 0.
        raise ArgumentError(
            "IndexedDataset",
            "several of them are joined, so that different samples have the same position",
            cure="IndexedDataset(ConcatDataset([first, second]))",
        )
    return len(inner) if hasattr(inner, "__len__") else None


def _parts(dataset: Any) -> Iterable[Any]:
    found: Iterable[Any] = getattr(dataset, "datasets", ())
    return found if not isinstance(dataset, IndexedDataset) else ()


def _bad_size(owner: object, argument: str, value: object) -> ArgumentError:
    return ArgumentError(
        owner,
        f"`{argument}` must be a whole number from 1 or None, got {value!r}",
        cure=f"{type(owner).__name__}({argument}=None)",
    )


__all__ = ["SampleMemoryRegularizer", "SampleTable", "training_set_size"]
