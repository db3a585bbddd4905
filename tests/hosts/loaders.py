"""A loader of ready batches, whatever they are made of."""

from collections.abc import Iterator, Sequence
from typing import Any


class Batches:
    """Gives each batch as it is; a plain list would be taken for several loaders."""

    def __init__(self, *batches: Any) -> None:
        self.batches: Sequence[Any] = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
