"""Keeps training the same at every width: what a small model was tuned with fits a large one."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import ArgumentError, Paper, UnsupportedError
from lightning_reg.mechanisms.reparameterization import Reparameterization
from lightning_reg.mechanisms.selected_weights import EVERYTHING

__all__ = ["MuParametrization", "base_shapes", "mu_parametrization"]

Rule = Literal["sgd", "adam"]
# By the names of optimizers: those that divide a gradient by its size step like Adam.
_KINDS: dict[Rule, tuple[str, ...]] = {
    "adam": ("adam", "adagrad", "rmsprop", "rprop", "lion", "lamb"),
    "sgd": ("sgd",),
}
# Layers whose weight has the inputs in front.
_INPUTS_FIRST = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvTransposeNd)


def mu_parametrization(
    v: Tensor, fan_in_ratio: float = 1.0, fan_out_ratio: float = 1.0, optimizer: Rule = "sgd"
) -> Tensor:
    """``W = m v`` with the multiplier ``m`` under which one learning rate fits every width.

    With ``r_in`` and ``r_out``, how much wider the weight is than in the base model (1 for a
    dimension that does not grow): ``m = sqrt(r_out / r_in)`` for SGD, whose step of ``W`` is
    ``m^2 lr dL/dW``, and ``m = 1 / r_in`` for Adam, whose step is ``m lr`` whatever the gradient.

    Args:
        v: what is trained, of any shape.
        fan_in_ratio: ``r_in``.
        fan_out_ratio: ``r_out``.
        optimizer: ``"sgd"`` or ``"adam"``.

    Returns:
        ``W``.
    """
    return v * _multiplier(fan_in_ratio, fan_out_ratio, optimizer)


def base_shapes(module: nn.Module) -> dict[str, list[int]]:
    """The shapes of all parameters of a narrow model, by name.

    Args:
        module: the model at the width that its hyperparameters are tuned at.
    """
    return {name: list(parameter.shape) for name, parameter in module.named_parameters()}


class MuParametrization(Reparameterization):
    """Keeps training the same at every width: what a small model was tuned with fits a large one.

    Yang, Hu (2020), Feature Learning in Infinite-Width Neural Networks, arXiv:2011.14522: the
    maximal update parametrization, muP.

    In the usual parametrization one step at a fixed learning rate changes the activations of wide
    layers without bound as the width ``n`` grows; in the neural tangent kernel's it changes none.
    muP is the one in between: every layer learns as fast as it can, at every width. In the
    paper's terms ``W = n^-a w`` with ``w ~ N(0, n^-2b)`` and a learning rate ``n^-c``: for SGD
    ``a = -1/2`` for inputs (and biases), 0 for hidden layers, ``1/2`` for outputs, ``b = 1/2`` and
    ``c = 0`` for all. The exponents of one layer may be shifted against each other, so all learning
    rates can be the same for Adam as well: ``a = 0``, 1 and 1, ``b = 0``, ``-1/2`` and 0.

    Widths count relative to a base model, at which muP is the usual parametrization: tune a narrow
    model without this technique, then train the wide one with its shapes and the same learning
    rate. Weights keep the initialization of their layers but for outputs, which are divided by
    ``sqrt(r_in)``, and biases of linear and convolutional layers, which are multiplied by it.

    Formulas confirmed against microsoft/mup@1981497 (mup/optim.py, shape.py, layer.py), which
    trains the same functions by learning rates for each parameter and whose outputs after training
    are in the tests. With Adam ``v`` has the gradient ``m dL/dW``, so its ``eps`` has to be small
    against that.

    Args:
        base_shapes: the shapes of the base model's parameters by name, as
            :func:`lightning_reg.functional.base_shapes` gives them. Every trainable parameter
            needs one; dimensions that differ are those that grow.
        optimizer: ``"sgd"``, or ``"adam"`` for optimizers that normalize gradients.
        rescale: bring a fresh initialization to muP's, once for each module; ``False`` for a
            module that was trained before.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if ``optimizer`` is none of these, or shapes are missing, of no parameter,
            or of another number of dimensions; at the start of training, if the Trainer's
            optimizer is of the other kind.
        UnsupportedError: if more than two dimensions of a parameter grow, if layers of different
            roles share a weight, or if a parameter that has to be scaled belongs to the module
            itself.

    Note:
        Over ranks: replica; nothing is communicated. Cost: a product with a number for each weight
        that grows, each time a layer uses it. Weight decay shrinks weights as at the base width.

        Dot products of attention have to be divided by ``d``, not by ``sqrt(d)``, relative to the
        base; that is the model's to do. A head that is tied to an embedding is refused. Gradient
        clipping by norm, and penalties on ``v``, see other scales than at the base width.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import MuParametrization
        >>> shapes = {"net.0.weight": [64, 8], "net.0.bias": [64], "net.2.weight": [1, 64]}
        >>> trainer = L.Trainer(callbacks=[MuParametrization(shapes)], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Feature Learning in Infinite-Width Neural Networks", "Yang et al.", 2020, "2011.14522"
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(mu_parametrization)
    explanation: ClassVar[str] = "trains every layer as fast as at the base width"
    default_selection = EVERYTHING

    def __init__(
        self,
        base_shapes: Mapping[str, Sequence[int]],
        *,
        optimizer: Rule = "adam",
        rescale: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if optimizer not in _KINDS:
            raise ArgumentError(
                self,
                f"`optimizer` must be one of {', '.join(_KINDS)}, got {optimizer!r}",
                cure='MuParametrization(shapes, optimizer="adam")',
            )
        self.base_shapes = {n: _shape(self, n, s) for n, s in dict(base_shapes).items()}
        self.optimizer: Rule = optimizer
        self.rescale = rescale
        self._rescaled: weakref.ref[nn.Module] | None = None
        self._multipliers: dict[str, float] = {}

    def reparametrized(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The weights whose multiplier is not 1."""
        weights = super().reparametrized(module)
        self._check_names(module, weights)
        places = {id(p.parameter): p for p in reversed(list(self._places(module)))}
        growths = {name: self._growth(places[id(w)]) for name, w in weights.items()}
        self._multipliers = {name: self._multiplier_of(g) for name, g in growths.items()}
        return {name: w for name, w in weights.items() if self._multipliers[name] != 1}

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse shapes that do not fit, and layers of different roles that share a weight."""
        super().validate(trainer, pl_module)
        found: dict[int, tuple[str, float]] = {}
        for place in self._places(pl_module):
            own = place.name, self._multiplier_of(self._growth(place))
            first, multiplier = found.setdefault(id(place.parameter), own)
            if multiplier != own[1]:
                raise UnsupportedError(
                    self,
                    f"scales {first} by {multiplier:.4g} and {place.name} by {own[1]:.4g}, and "
                    "they share one weight",
                    cure="give the head a weight of its own",
                )

    def on_model_ready(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the initialization to muP's, then put the multipliers in place."""
        fresh = self._rescaled is None or self._rescaled() is not pl_module
        if self.rescale and fresh:
            self._rescale(pl_module)
            self._rescaled = weakref.ref(pl_module)
        super().on_model_ready(trainer, pl_module)

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an optimizer of the other kind."""
        super().on_reference(trainer, pl_module)
        for optimizer in trainer.optimizers:
            used = type(optimizer).__name__
            kinds = [k for k, words in _KINDS.items() if any(w in used.lower() for w in words)]
            if kinds and self.optimizer not in kinds:
                raise ArgumentError(
                    self,
                    f"scales weights for {self.optimizer!r}, and the optimizer is {used}",
                    cure=f'MuParametrization(shapes, optimizer="{kinds[0]}")',
                )

    def parametrization(self, name: str, weight: Tensor) -> nn.Module:
        """The multiplier of one weight."""
        return _Scaled(self._multipliers[name])

    # ------------------------------------------------------------------ internals

    def _multiplier_of(self, growth: _Growth) -> float:
        return _multiplier(growth.fan_in, growth.fan_out, self.optimizer)

    def _check_names(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        known = dict(module.named_parameters())
        cure = "MuParametrization(base_shapes(Model(width=64)))"
        missing = [name for name in weights if name not in self.base_shapes]
        unknown = [name for name in self.base_shapes if name not in known]
        if missing or unknown:
            what = f"no shape for {missing[0]}" if missing else f"a shape for {unknown[0]}"
            raise ArgumentError(
                self,
                f"`base_shapes` has {what}, and the module has {', '.join(list(known)[:12])}",
                cure=cure,
            )
        for name, shape in self.base_shapes.items():
            if len(shape) != known[name].ndim:
                raise ArgumentError(
                    self,
                    f"`base_shapes` has {name} as {shape}, and it is {list(known[name].shape)}",
                    cure=cure,
                )

    def _growth(self, place: _Place) -> _Growth:
        """How the dimensions of a weight grow, as the layer uses them."""
        base, shape = self.base_shapes[place.first], place.parameter.shape
        ratios = [size / narrow for size, narrow in zip(shape, base, strict=True)]
        growing = [i for i, ratio in enumerate(ratios) if ratio != 1]
        is_layer = isinstance(place.layer, (nn.Linear, nn.modules.conv._ConvNd, *_INPUTS_FIRST))
        if len(growing) > 2 or (is_layer and any(i > 1 for i in growing)):
            raise UnsupportedError(
                self,
                f"knows how outputs and inputs of a layer grow, and {place.name} grows from {base} "
                f"to {list(shape)}",
                cure="MuParametrization(base_shapes(<the same model with another width>))",
            )
        if is_layer and len(shape) > 1:
            out, into = (1, 0) if isinstance(place.layer, _INPUTS_FIRST) else (0, 1)
            return _Growth(fan_in=ratios[into], fan_out=ratios[out])
        grown = [ratios[i] for i in growing] + [1.0, 1.0]
        return _Growth(fan_in=grown[1], fan_out=grown[0])

    def _rescale(self, module: nn.Module) -> None:
        done: set[int] = set()
        with torch.no_grad():
            for place in self._places(module):
                layer, weight = place.layer, place.parameter
                if not _is_weight(place) or id(weight) in done:
                    continue
                done.add(id(weight))
                growth = self._growth(place)
                if growth.fan_out == 1:
                    weight.div_(math.sqrt(growth.fan_in))
                bias = layer.bias
                if isinstance(bias, Tensor):
                    bias.mul_(math.sqrt(growth.fan_in))

    def _places(self, module: nn.Module) -> Iterator[_Place]:
        """Every layer's use of a trainable parameter."""
        first: dict[int, str] = {}
        for path, layer in module.named_modules():
            for attribute, parameter in layer.named_parameters(
                recurse=False, remove_duplicate=False
            ):
                name = f"{path}.{attribute}" if path else attribute
                first.setdefault(id(parameter), name)
                if parameter.requires_grad:
                    yield _Place(name, first[id(parameter)], attribute, layer, parameter)

    def __getstate__(self) -> dict[str, object]:
        # The module is not the technique's; a copy is for another.
        return {**super().__getstate__(), "_rescaled": None, "_multipliers": {}}


@dataclass(frozen=True)
class _Growth:
    """How much wider a weight is than in the base model."""

    fan_in: float
    fan_out: float


@dataclass(frozen=True)
class _Place:
    """A layer's use of a parameter, which may have another name where it was met first."""

    name: str
    first: str
    attribute: str
    layer: Any
    parameter: nn.Parameter


class _Scaled(nn.Module):
    """``m v`` and its inverse."""

    def __init__(self, multiplier: float) -> None:
        super().__init__()
        self.multiplier = multiplier

    def forward(self, v: Tensor) -> Tensor:
        """``v`` to ``W``."""
        return v * self.multiplier

    def right_inverse(self, weight: Tensor) -> Tensor:
        """``W`` to ``v``."""
        return weight / self.multiplier


def _multiplier(fan_in: float, fan_out: float, optimizer: Rule) -> float:
    return math.sqrt(fan_out / fan_in) if optimizer == "sgd" else 1 / fan_in


def _is_weight(place: _Place) -> bool:
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return place.attribute == "weight" and isinstance(place.layer, layers)


def _shape(owner: object, name: str, shape: Sequence[int]) -> list[int]:
    sizes = list(shape)
    if not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        raise ArgumentError(
            owner,
            f"`base_shapes` must hold whole numbers from 1, got {shape!r} for {name}",
            cure="MuParametrization(base_shapes(Model(width=64)))",
        )
    return sizes
