"""Noise on weights, on masks over weights, and on activations while the user's step runs.

A technique supplies :meth:`ForwardNoise.noisy_weights` (other weights for one step, from the
weights) or :meth:`ActivationNoise.noisy_output` (another output of a layer). The mechanism takes
care of

- which weights: selected ones, in every place where a tied weight is used, recurrent layers too;
- gradients: they flow through the noise to the module's own parameters, which stay in the
  optimizer and in DDP; layers see a plain tensor in the parameter's place;
- time: the noise is there from the first to the last line of the user's ``training_step``, and
  in a second pass (SAM) it is the same noise; validation and whatever else runs between two
  steps sees the weights as they are;
- undoing: after the step, and after an exception, the module holds the parameter objects that it
  held before;
- randomness: noise on weights is one draw per optimizer step, the same on all ranks and in all
  micro-batches, so that N ranks, or N micro-batches, train what one process trains on the joint
  batch; noise on activations is one stream per micro-batch and rank, as samples are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine.errors import ArgumentError, RegularizationError
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.selection import ParameterSelection
from lightning_reg.engine.step import Step
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.selected_weights import SelectedWeights

Place = tuple[nn.Module, str]

# Of techniques on activations.
OWN_NOISE = {"accumulation": "each micro-batch draws its own noise for its samples"}


class ForwardNoise(SelectedWeights):
    """Base of techniques that run the user's step with other weights.

    Args:
        strength: how much noise; 0 turns the technique off.
        parameters: a regular expression on parameter names, or a :class:`ParameterSelection`.
        name: the name in logs, checkpoints and random streams.
    """

    semantics: ClassVar[Semantics] = "replica"
    reads: ClassVar[frozenset[str]] = frozenset({"weights"})
    writes: ClassVar[frozenset[str]] = frozenset({"features", "weights"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        parameters: str | ParameterSelection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, parameters=parameters, name=name)
        self._places: dict[str, list[Place]] = {}
        self._places_of: Mapping[str, nn.Parameter] | None = None

    @abstractmethod
    def noisy_weights(
        self, weights: Mapping[str, Tensor], strength: float, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Weights for this step, differentiable functions of the ones that are given.

        Args:
            weights: by name.
            strength: the technique's strength now.
            generator: on the weights' device, the same on all ranks.

        Returns:
            By name; a weight that is left out stays as it is.
        """

    @contextmanager
    def forward_context(self, step: Step) -> Iterator[None]:
        """Phase 2."""
        places = self._find_places(step)
        # What another technique has put in a weight's place is noised further.
        weights = {name: _get(*uses[0]) for name, uses in places.items()}
        generator = step.rng(self, shared=True, per="step")
        noisy = self.noisy_weights(weights, step.strength(self), generator)
        exchange = [(place, tensor) for name, tensor in noisy.items() for place in places[name]]
        with exchanged(exchange):
            yield

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the module."""
        super().on_fit_close(trainer, pl_module)
        self._places, self._places_of = {}, None

    def _find_places(self, step: Step) -> dict[str, list[Place]]:
        selected = self.selected(step)
        if selected is not self._places_of:
            self._places = _places(step.module, selected)
            self._places_of = selected
        return self._places

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds the places in its own module.
        return {**super().__getstate__(), "_places": {}, "_places_of": None}


class ActivationNoise(Regularizer):
    """Base of techniques that change what layers return.

    Args:
        strength: how much noise; 0 turns the technique off.
        layers: names of submodules whose output, a tensor, is changed.
        name: the name in logs, checkpoints and random streams.
        others: arguments of the next base, where a technique has several.
    """

    semantics: ClassVar[Semantics] = "local"
    reads: ClassVar[frozenset[str]] = frozenset({"features"})
    writes: ClassVar[frozenset[str]] = frozenset({"features"})
    # Of a layer that returns a tuple, as blocks of transformers do, the first item is changed.
    takes_tuples: ClassVar[bool] = False

    def __init__(
        self,
        strength: float | Schedule,
        *,
        layers: str | Sequence[str],
        name: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__(strength, name=name, **others)
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        if not self.layers or not all(isinstance(layer, str) for layer in self.layers):
            raise ArgumentError(
                self,
                f"`layers` must be names of submodules, got {layers!r}",
                cure=f'{type(self).__name__}(layers=["encoder"])',
            )
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._now: tuple[Step, torch.Generator] | None = None

    @abstractmethod
    def noisy_output(self, output: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """Another output of a layer.

        Args:
            output: what the layer returned.
            strength: the technique's strength now.
            generator: on the output's device, this rank's.
        """

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse layers that the module does not have."""
        known = dict(pl_module.named_modules())
        for layer in self.layers:
            if layer not in known:
                raise ArgumentError(
                    self,
                    f"the module has no layer {layer!r}, only {', '.join(n for n in known if n)}",
                    cure=f"{type(self).__name__}(layers=[...])",
                )

    def noised(self, module: nn.Module) -> Sequence[str]:
        """The names of the submodules whose outputs are changed: by default ``layers``."""
        return self.layers

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the layers; a hook that came and went with each step would recompile them."""
        for layer in self.noised(pl_module):
            module = pl_module.get_submodule(layer)
            self._handles.append(module.register_forward_hook(_NoiseHook(self, layer)))

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def forward_context(self, step: Step) -> AbstractContextManager[Any]:
        """Phase 2."""
        return self._noising(step)

    @contextmanager
    def _noising(self, step: Step) -> Iterator[None]:
        outer, self._now = self._now, (step, step.rng(self))
        try:
            yield
        finally:
            self._now = outer

    def change(self, layer: str, output: Any) -> Any:
        """What ``layer`` returns in place of ``output``: another tensor while a step runs."""
        if self._now is None or self._now[0].evaluating:
            return output
        if self.takes_tuples and isinstance(output, tuple) and output:
            return (self.change(layer, output[0]), *output[1:])
        if not isinstance(output, Tensor):
            raise RegularizationError(
                self,
                f"changes the output of {layer!r}, which must be a tensor, got "
                f"{type(output).__name__}",
                cure=f'{type(self).__name__}(layers=["<a layer that returns a tensor>"])',
            )
        step, generator = self._now
        return self.noisy_output(output, step.strength(self), generator)

    def __getstate__(self) -> dict[str, Any]:
        # The hooks belong to the module of the run.
        return {**super().__getstate__(), "_handles": [], "_now": None}


class _NoiseHook:
    """A forward hook that survives the copying of its module, as a no-op."""

    def __init__(self, technique: ActivationNoise | None, layer: str) -> None:
        self._technique = technique
        self._layer = layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output if self._technique is None else self._technique.change(self._layer, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _NoiseHook:
        return _NoiseHook(None, self._layer)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_NoiseHook, (None, self._layer))


@contextmanager
def exchanged(tensors: Sequence[tuple[Place, Tensor]]) -> Iterator[None]:
    """Put tensors in the places of parameters; the parameters themselves come back."""
    kept = [(place, _get(*place)) for place, _ in tensors]
    try:
        for place, tensor in tensors:
            _put(*place, tensor)
        yield
    finally:
        for place, parameter in kept:
            _put(*place, parameter)


def _places(module: nn.Module, selected: Mapping[str, nn.Parameter]) -> dict[str, list[Place]]:
    """Every module and attribute that holds a selected weight."""
    names = {id(weight): name for name, weight in selected.items()}
    places: dict[str, list[Place]] = {name: [] for name in selected}
    for holder in module.modules():
        for attribute, weight in holder._parameters.items():
            if id(weight) in names:
                places[names[id(weight)]].append((holder, attribute))
    return places


def _get(holder: nn.Module, attribute: str) -> Tensor:
    weight = holder._parameters[attribute]
    assert weight is not None
    return weight


def _put(holder: nn.Module, attribute: str, weight: Tensor) -> None:
    # Past `__setattr__`, which takes parameters only; the order of the dict stays. Recurrent layers
    # notice by themselves, in their next forward.
    holder._parameters[attribute] = weight  # type: ignore[assignment]


__all__ = ["OWN_NOISE", "ActivationNoise", "ForwardNoise", "exchanged"]
