"""Weights that are a function of other weights while training runs.

A technique supplies :meth:`Reparameterization.parametrization`: for one weight ``w`` a module with
``forward(v)``, which gives ``w``, and ``right_inverse(w)``, which gives ``v``; what it learns are
its parameters. The mechanism takes care of

- the moment: before optimizers and DDP exist, so that both see ``v`` and the learned parameters;
- tied weights, which stay tied;
- plain weights at the end of a fit and after an exception: each parameter is the same object as
  before, holds ``w``, and stands in its old place in its layer;
- checkpoints, which hold plain weights under their usual names, so that they load with or without
  the technique; ``v`` and the learned parameters stand beside them, so that a resume is exact;
- deep copies of the module during a fit. (torch refuses to pickle a parametrized module.)

The optimizer's weight decay acts on ``v``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from lightning_reg.engine import ParameterSelection, UnsupportedError
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.selected_weights import SelectedWeights

_TENSORS = "lightning_reg.reparameterization"


class Reparameterization(SelectedWeights):
    """Base of techniques that train ``v`` where a layer computes with ``w = f(v)``.

    Args:
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`;
            ``None`` takes the weights of all linear and convolutional layers.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "replica"
    reads: ClassVar[frozenset[str]] = frozenset({"weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def __init__(
        self,
        *,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(1.0, parameters=parameters, name=name)
        self._bound: list[_Bound] = []
        self._last: dict[str, Tensor] = {}

    @abstractmethod
    def parametrization(self, name: str, weight: Tensor) -> nn.Module:
        """The function of one weight, with ``forward`` and ``right_inverse``.

        Args:
            name: the weight's name, for errors.
            weight: its values when training starts.
        """

    def reparametrized(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that become a function: all chosen ones, unless a technique leaves some."""
        return self.selection.select(module, self)

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an empty choice, and weights that cannot become a function of others."""
        super().validate(trainer, pl_module)
        for name in self.reparametrized(pl_module):
            if "." not in name:
                raise UnsupportedError(
                    self,
                    f"{name} belongs to {type(pl_module).__name__} itself, whose class may not "
                    "change while it trains",
                    cure=f"self.layer = Layer({name}), or leave it out with "
                    f'parameters=ParameterSelection(exclude="^{name}$")',
                )
            if "parametrizations." in name:
                raise UnsupportedError(
                    self,
                    f"{name} is parametrized already",
                    cure='parameters=ParameterSelection(exclude="parametrizations")',
                )

    def on_model_ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the functions in place."""
        weights = self.reparametrized(pl_module)
        # All functions before the first change, so that one that refuses leaves nothing behind.
        functions = [self.parametrization(n, w.detach()).to(w.device) for n, w in weights.items()]
        for weight, function in zip(weights.values(), functions, strict=True):
            first, *tied = _holders(pl_module, weight)
            self._bound.append(_Bound.to(*first, function))
            # The weight now holds v, and the further layers that share it must not invert it again.
            self._bound += [_Bound.to(*holder, _Shared(function)) for holder in tied]

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plain weights again; the tensors stay, for a checkpoint that is written after the fit."""
        super().on_fit_close(trainer, pl_module)
        self._last = self._copies()
        with torch.no_grad():
            # All of them before the first is written: tied layers share what is overwritten.
            weights = [bound.weight().clone() for bound in self._bound]
        # The last first: of a layer that has several, each knows the order that it found.
        for bound, weight in reversed(list(zip(self._bound, weights, strict=True))):
            bound.remove(weight)
        self._bound = []

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save ``v`` and what the functions hold; they are weights, not a state of their own."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint.setdefault(_TENSORS, {})[self.state_key] = self._copies() or self._last

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with what the checkpoint's plain weights give up to rounding only."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        saved = checkpoint.get(_TENSORS, {}).get(self.state_key)
        if saved is None:
            checkpoint["optimizer_states"] = []
            rank_zero_warn(
                f"{self.state_key}: the checkpoint holds no state of this technique. Its weights "
                "are taken over; the optimizer starts afresh, since its state is of other "
                "parameters."
            )
            return
        tensors = self._tensors()
        with torch.no_grad():
            for key in saved.keys() & tensors.keys():
                tensors[key].copy_(saved[key])

    def _copies(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for bound in self._bound:
            found.update(bound.tensors())
        return found

    def __getstate__(self) -> dict[str, object]:
        # What is bound belongs to one module; a copy binds its own.
        return {**super().__getstate__(), "_bound": [], "_last": {}}


@dataclass
class _Bound:
    """One parametrized weight of one layer."""

    path: str
    layer: nn.Module
    attribute: str
    order: list[str]
    hooks: list[RemovableHandle]

    @classmethod
    def to(cls, path: str, layer: nn.Module, attribute: str, function: nn.Module) -> _Bound:
        order = list(layer._parameters)
        parametrize.register_parametrization(layer, attribute, function)
        hooks = [
            layer.register_state_dict_post_hook(partial(_save_plain, attribute)),
            layer.register_load_state_dict_pre_hook(partial(_load_plain, attribute)),
        ]
        return cls(path, layer, attribute, order, hooks)

    def weight(self) -> Tensor:
        value: Tensor = getattr(self.layer, self.attribute)
        return value

    def tensors(self) -> dict[str, Tensor]:
        prefix = f"{self.path}.{self.attribute}"
        state = _part(self.layer, self.attribute).state_dict(keep_vars=True)
        return {f"{prefix}.{key}": tensor for key, tensor in state.items()}

    def remove(self, weight: Tensor) -> None:
        for hook in self.hooks:
            hook.remove()
        parametrize.remove_parametrizations(self.layer, self.attribute, leave_parametrized=False)
        with torch.no_grad():
            getattr(self.layer, self.attribute).copy_(weight)
        # Where it stood: the order of parameters is the order of the optimizer's state.
        for name in self.order:
            self.layer._parameters[name] = self.layer._parameters.pop(name)


class _Shared(nn.Module):
    """The function of a tied weight for its further layers, where the weight already holds v."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, v: Tensor) -> Tensor:
        """The same function."""
        weight: Tensor = self.function(v)
        return weight


def _holders(module: nn.Module, weight: nn.Parameter) -> Iterator[tuple[str, nn.Module, str]]:
    """Every place where a weight is held, tied ones too."""
    for path, layer in module.named_modules():
        for attribute, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            if parameter is weight:
                yield path, layer, attribute


def _part(layer: Any, attribute: str) -> nn.Module:
    part: nn.Module = layer.parametrizations[attribute]
    return part


def _save_plain(
    attribute: str, layer: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any
) -> None:
    """In a checkpoint stands the weight, as if it were plain."""
    within = f"{prefix}parametrizations.{attribute}."
    for key in [key for key in state if key.startswith(within)]:
        del state[key]
    state[prefix + attribute] = getattr(layer, attribute).detach()


def _load_plain(
    attribute: str, layer: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any
) -> None:
    """A plain weight becomes v; what the function holds stays, until its state comes."""
    weight = state.pop(prefix + attribute, None)
    if weight is None:
        return
    part: Any = _part(layer, attribute)
    within = f"{prefix}parametrizations.{attribute}."
    state.update({within + key: value for key, value in part.state_dict().items()})
    function: Any = part[0].function if isinstance(part[0], _Shared) else part[0]
    with torch.no_grad():
        state[within + "original"] = function.right_inverse(weight.to(part.original))


__all__ = ["Reparameterization"]
