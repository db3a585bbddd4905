"""Penalties on weights that lie on one path through the network and are counted together.

A technique supplies :meth:`WeightPaths.find_paths`, the names of the weights of each path in the
order of the layers, and over lists of their tensors :meth:`WeightPaths.values` and
:meth:`WeightPaths.closed_form`. The mechanism takes care of what :class:`NamedPenalty` takes care
of, and of

- paths that are looked for before training starts, and an error if there is none;
- frozen weights and those of other optimizers, which enter as constants;
- weights that lie on several paths, whose gradients are summed;
- weights in float32 at least.

Every rank computes the whole, which costs a pass over the weights. Sharded weights are refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import Schedule
from lightning_reg.engine.step import RunContext, full_precision
from lightning_reg.mechanisms.weight_penalty import Mode, NamedPenalty

Path = tuple[str, ...]


class WeightPaths(NamedPenalty):
    """Base of penalties that are a sum over paths.

    Args:
        strength: the multiplier.
        mode: ``"gradient"`` adds the closed-form gradient once per optimizer step; ``"loss"``
            adds the value to the loss of every micro-batch.
        name: the name in logs and checkpoints.
    """

    sharded: ClassVar[bool | None] = False
    splits: ClassVar[bool] = False

    def __init__(
        self, strength: float | Schedule, *, mode: Mode = "gradient", name: str | None = None
    ) -> None:
        super().__init__(strength, mode=mode, name=name)
        self._paths: list[Path] = []

    @abstractmethod
    def find_paths(self, module: nn.Module) -> list[Path]:
        """The names of the weights of each path; an error that says what to do if there is none."""

    @abstractmethod
    def values(self, paths: Sequence[Sequence[Tensor]]) -> Tensor:
        """The penalty (N,) of each of N paths, differentiable."""

    @abstractmethod
    def closed_form(self, paths: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        """The penalties (N,), and for each path the gradients by its tensors."""

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the paths."""
        self._paths = self.find_paths(pl_module)

    def selected(self, context: RunContext) -> dict[str, nn.Parameter]:
        """The weights on the paths that learn."""
        names = dict.fromkeys(name for path in self._paths for name in path)
        weights = {name: context.module.get_parameter(name) for name in names}
        return {name: weight for name, weight in weights.items() if weight.requires_grad}

    def values_of(self, context: RunContext, weights: Mapping[str, nn.Parameter]) -> Tensor:
        """The penalty of each path."""
        return self.values(self._tensors(context.module))

    def closed_form_of(
        self, context: RunContext, weights: Mapping[str, nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """The penalty of each path, and the gradient by each weight."""
        values, gradients = self.closed_form(self._tensors(context.module))
        total: dict[str, Tensor] = {}
        for path, parts in zip(self._paths, gradients, strict=True):
            for name, part in zip(path, parts, strict=True):
                total[name] = total[name] + part if name in total else part
        return values, [total[name] for name in weights]

    def _tensors(self, module: nn.Module) -> list[list[Tensor]]:
        # A weight that lies on several paths is converted once.
        found = {
            name: full_precision(module.get_parameter(name))
            for name in dict.fromkeys(name for path in self._paths for name in path)
        }
        held = found if torch.is_grad_enabled() else {n: t.detach() for n, t in found.items()}
        return [[held[name] for name in path] for path in self._paths]

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_paths": []}


__all__ = ["Path", "WeightPaths"]
