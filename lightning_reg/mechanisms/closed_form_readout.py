"""Linear layers that are solved for, in closed form, from sums over all samples of an epoch.

A technique supplies :meth:`ClosedFormReadout.rows`, the rows ``X`` (N, d) and ``Y`` (N, c) of a
micro-batch, and :meth:`ClosedFormReadout.solve`, the layer's weight from their :class:`Moments`.
The mechanism takes care of

- the sums ``X^T X``, ``X^T Y``, of the rows and of ``|Y|^2``, in float64, over micro-batches and
  over all ranks: one all-reduce a micro-batch. The solution is that of all samples together; a mean
  of the ranks' solutions is not. Rows that are not finite, and those that a sampler repeats where
  batches carry positions (``IndexedDataset``), do not count;
- the moment: behind the last optimizer step of an epoch, in front of its validation;
- an intercept where the layer has a bias, which nothing shrinks: moments are taken about the mean;
- a strength below 1, which moves the layer that share of the way;
- checkpoints inside an epoch, which hold the sums.

Rows are taken from the training steps as they come: where what is below the layer trains as well,
they are those of all of the epoch's weights.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ParameterUpdate, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.observe import StepWatcher
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.selected_weights import check_share


@dataclass
class Moments:
    """Second moments of rows ``x`` (d) and ``y`` (c), about their means if there is an intercept.

    Attributes:
        gram: ``sum x x^T`` (d, d).
        cross: ``sum x y^T`` (d, c).
        energy: ``sum |y|^2``.
        count: the number of rows.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    count: Tensor

    def residual(self, weight: Tensor) -> Tensor:
        """The mean over rows of ``|y - W x|^2`` for ``W`` (c, d)."""
        explained = 2 * (weight.T * self.cross).sum() - ((weight @ self.gram) * weight).sum()
        return (self.energy - explained) / self.count


class ClosedFormReadout(StepWatcher, Regularizer):
    """Base of techniques that set a linear layer to the solution of a least-squares problem.

    Args:
        strength: the share of the way from the layer's weights to the solution, in [0, 1].
        layer: the name of the ``nn.Linear`` that is solved for.
        every: the number of epochs from one solution to the next.
        signals: where the technique finds its tensors.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "global"
    sharded: ClassVar[bool | None] = False
    reads: ClassVar[frozenset[str]] = frozenset({"weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        layer: str,
        every: int = 1,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, signals=signals, name=name)
        check_share(self, strength)
        owner = type(self).__name__
        if not isinstance(layer, str) or not layer:
            problem = f"`layer` must be the name of a linear layer, got {layer!r}"
            raise ArgumentError(self, problem, cure=f'{owner}(layer="head")')
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            problem = f"`every` must be a whole number of epochs from 1, got {every!r}"
            raise ArgumentError(self, problem, cure=f"{owner}(every=1)")
        self.layer = layer
        self.every = every
        self._sums: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ what a technique supplies

    @abstractmethod
    def rows(self, step: Step) -> tuple[Tensor, Tensor]:
        """What the layer reads (N, d) and what it should return (N, c), of this micro-batch."""

    @abstractmethod
    def solve(self, moments: Moments) -> Tensor:
        """The weight (c, d) in the layout of ``nn.Linear``, in float64."""

    def linear(self, module: nn.Module) -> nn.Linear:
        """The layer that is solved for."""
        layers = {
            name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)
        }
        if self.layer not in layers:
            raise ArgumentError(
                self,
                f"`layer` is {self.layer!r}, which is no linear layer of this module; those are "
                f"{', '.join(layers) or 'none'}",
                cure=f'{type(self).__name__}(layer="{next(iter(layers), "head")}")',
            )
        return layers[self.layer]

    # ------------------------------------------------------------------ phases

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a layer that is no linear one."""
        self.linear(pl_module)

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that starts anew has seen nothing."""
        if int(trainer.global_step) == 0:
            self._sums = {}

    def watch(self, step: Step) -> None:
        """Add the micro-batch to the sums."""
        if step.strength(self) == 0 or not self._collects(step.epoch):
            return
        x, y = self.rows(step)
        self._check_sizes(step.module, x, y)
        found = _sums(x.detach(), y.detach(), step.padding)
        joint = step.comm.reduce(torch.cat([part.flatten() for part in found.values()]))
        parts = joint.split([part.numel() for part in found.values()])
        for (key, own), part in zip(found.items(), parts, strict=True):
            part = part.view_as(own)
            self._sums[key] = self._sums[key].to(part) + part if key in self._sums else part

    def project(self, update: ParameterUpdate) -> Tensor | None:
        """Phase 8 of the epoch's last step."""
        ends = bool(update.trainer.is_last_batch) and self._collects(update.epoch)
        if not ends or not self._sums:
            return None
        sums, self._sums = self._sums, {}
        if not bool(sums["count"] > 0):
            # Once an epoch a host sync is cheap, and without rows there is nothing to solve.
            return None
        linear, share = self.linear(update.module), update.strength(self)
        moments, means = _moments(sums, about_means=linear.bias is not None)
        weight = self.solve(moments)
        _move(linear.weight, weight, share)
        if linear.bias is not None:
            _move(linear.bias, means[1] - weight @ means[0], share)
        return moments.residual(weight)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch so far."""
        return {"sums": {key: value.detach().cpu().clone() for key, value in self._sums.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._sums = dict(state_dict["sums"])

    # ------------------------------------------------------------------ internals

    def _collects(self, epoch: int) -> bool:
        return (epoch + 1) % self.every == 0

    def _check_sizes(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        linear = self.linear(module)
        if x.shape[1:] != (linear.in_features,) or y.shape[1:] != (linear.out_features,):
            raise ArgumentError(
                self,
                f"solves for `{self.layer}`, which maps {linear.in_features} numbers to "
                f"{linear.out_features}, and was given rows of shapes {tuple(x.shape)} and "
                f"{tuple(y.shape)}",
                cure=f'{type(self).__name__}(layer="<the layer that reads those rows>")',
            )


def _sums(x: Tensor, y: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
    """Sums over rows that count."""
    # MPS has no float64.
    kind = torch.float32 if x.device.type == "mps" else torch.float64
    x, y = x.to(kind), y.to(kind)
    counts = x.isfinite().all(1) & y.isfinite().all(1)
    if padding is not None and len(padding) == len(x):
        counts &= ~padding
    x, y = x.where(counts[:, None], 0.0), y.where(counts[:, None], 0.0)
    return {
        "gram": x.T @ x,
        "cross": x.T @ y,
        "x": x.sum(0),
        "y": y.sum(0),
        "energy": y.square().sum(),
        "count": counts.sum().to(kind),
    }


def _moments(sums: dict[str, Tensor], about_means: bool) -> tuple[Moments, tuple[Tensor, Tensor]]:
    count = sums["count"]
    means = (sums["x"] / count, sums["y"] / count)
    raw = Moments(sums["gram"], sums["cross"], sums["energy"], count)
    if not about_means:
        return raw, means
    x, y = means
    return Moments(
        raw.gram - count * torch.outer(x, x),
        raw.cross - count * torch.outer(x, y),
        raw.energy - count * y.square().sum(),
        count,
    ), means


def _move(parameter: Tensor, target: Tensor, share: float) -> None:
    current = parameter.detach()
    current.copy_(target if share == 1 else torch.lerp(current.to(target), target, share))


__all__ = ["ClosedFormReadout", "Moments"]
