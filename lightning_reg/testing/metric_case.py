"""What the contract has to know of a metric to put it to the test."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MetricCase:
    """How to build a metric for the contract, and what to feed it.

    Args:
        args: keyword arguments of the class.
        data: positional arguments of ``update``: 40 samples or more, finite, seeded; samples 1
            and 3 count (``invalid`` puts NaN and infinity into them).
        dims: the dimension of each tensor of ``data`` that counts samples; 0 by default.
        function_args: keyword arguments of ``cls.function``; those of the class by default.
        invalid: the position in ``data`` of the tensor in which NaN leaves out a sample.
        half: the positions in ``data`` of tensors that come in fp16 and bf16 from mixed precision.
        empty_is_nan: whether every floating value is NaN before anything was counted.
        bad: positional arguments of ``update``, each of which must be refused with an
            :class:`ArgumentError`.
        tolerance: absolute and relative, of values that are equal up to rounding.
        exemptions: checks that are not run, with the reasons.

    Example:
        >>> import torch
        >>> from lightning_reg.testing import MetricCase
        >>> logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
        >>> case = MetricCase(args={"from_logits": True}, data=(logits, torch.arange(60) % 5))
    """

    args: Mapping[str, Any]
    data: tuple[Tensor, ...]
    dims: tuple[int, ...] | None = None
    function_args: Mapping[str, Any] | None = None
    invalid: int = 0
    half: Sequence[int] = (0,)
    empty_is_nan: bool = True
    bad: Sequence[tuple[Any, ...]] = ()
    tolerance: float = 1e-9
    exemptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of samples."""
        return self.data[0].shape[self.dim(0)]

    def dim(self, position: int) -> int:
        """The dimension of a tensor of ``data`` that counts samples."""
        return 0 if self.dims is None else self.dims[position]

    def part(self, start: int, end: int) -> tuple[Tensor, ...]:
        """Some of the samples, as tensors of their own."""
        return tuple(
            t.narrow(self.dim(i), start, end - start).clone() for i, t in enumerate(self.data)
        )

    def split(self, sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """All samples in parts of these sizes."""
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        return [self.part(a, b) for a, b in itertools.pairwise(ends)]
