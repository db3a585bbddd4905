"""Numbers in the module or in callbacks that follow a schedule over the run.

A technique supplies :meth:`AttributeSchedule.targets`: which attributes; and, where one schedule
means something else for each of them, :meth:`AttributeSchedule.value_of`. Without a technique, the
mechanism drives the attributes at dotted paths. It takes care of

- refusing, before training, an attribute that is not there or is no number (or, for techniques
  with ``takes_schedules``, no Schedule either);
- writing the schedule's value, or that share of the attribute's own value, in front of every
  training step, before any technique looks at it, and only where it changed;
- putting the attributes' own values back when the fit is over, after an exception too;
- resume: the values follow from the position in the run, so that there is nothing to save;
- the log: ``reg/<name>`` is the mean of the values that were written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.signals import read_path
from lightning_reg.engine.step import RunContext, Step
from lightning_reg.engine.technique import Semantics

Target = tuple[Any, str]


class AttributeSchedule(Regularizer):
    """Sets attributes of the module or of callbacks from a schedule.

    Args:
        strength: the value over the run, a number or a :class:`Schedule`.
        paths: dotted paths from the module (``"net.3.p"``), or from a callback by its class or by
            its name in logs (``"callbacks.Mixup.alpha"``).
        relative: whether the value multiplies each attribute's own, or replaces it.
        name: the name in logs and checkpoints.
    """

    semantics: ClassVar[Semantics] = "replica"
    writes: ClassVar[frozenset[str]] = frozenset({"features"})
    takes_schedules: ClassVar[bool] = False

    def __init__(
        self,
        strength: float | Schedule,
        *,
        paths: Sequence[str] = (),
        relative: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, name=name)
        if isinstance(paths, str):
            problem = f"`paths` must be a list of dotted paths, got {paths!r}"
            raise ArgumentError(self, problem, cure=f'AttributeSchedule(..., paths=["{paths}"])')
        self.paths = list(paths)
        self.relative = relative
        self._targets: dict[str, Target] = {}
        self._own: dict[str, Any] = {}
        self._written: float | None = None

    def targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, Target]:
        """The objects and the names of their attributes, by a name for messages."""
        if not self.paths:
            cure = 'AttributeSchedule(LinearSchedule(0.5, 0.0), paths=["net.3.p"])'
            raise ArgumentError(self, "has no `paths`, so it sets nothing", cure=cure)
        return {path: self._target(path, trainer, pl_module) for path in self.paths}

    def value(self, own: float, scheduled: float) -> float:
        """What is written, from an attribute's own value and the schedule's."""
        return own * scheduled if self.relative else scheduled

    def value_of(self, name: str, own: Any, scheduled: float) -> Any:
        """What is written to the target ``name``; by default :meth:`value`, alike for all."""
        return self.value(own, scheduled)

    def scheduled(self, step: Step) -> float:
        """The schedule's value now."""
        return step.strength(self)

    def logged(self, scheduled: float) -> float | None:
        """What is logged: by default the mean of the values that are written."""
        values = [self.value_of(name, own, scheduled) for name, own in self._own.items()]
        return sum(values) / len(values) if values else None

    def active(self, context: RunContext) -> bool:  # type: ignore[override]
        """Always: a value of 0 has to be written too."""
        return True

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse attributes that are not there; remember their own values."""
        targets = dict(self.targets(trainer, pl_module))
        own = {name: self._read(name, *target) for name, target in targets.items()}
        self._targets, self._own, self._written = targets, own, None

    def prepare(self, step: Step) -> None:
        """Phase 0."""
        scheduled = self.scheduled(step)
        if scheduled != self._written:
            self._written = scheduled
            for name, (owner, attribute) in self._targets.items():
                setattr(owner, attribute, self.value_of(name, self._own[name], scheduled))
        if step.logging:
            step.log(self, self.logged(scheduled), joint=True)

    def on_fit_close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the own values back."""
        for name, (owner, attribute) in self._targets.items():
            setattr(owner, attribute, self._own[name])
        self._targets, self._own, self._written = {}, {}, None

    def _target(self, path: str, trainer: pl.Trainer, module: pl.LightningModule) -> Target:
        start, place = module, path
        if path.startswith("callbacks."):
            _, wanted, place = path.split(".", 2) if path.count(".") > 1 else (path, "", "")
            start = self._callback(wanted, trainer)
        parent, _, attribute = place.rpartition(".")
        try:
            return (read_path(start, parent) if parent else start), attribute
        except KeyError as error:
            raise ArgumentError(
                self,
                f"sets {path!r}, and there is no {error.args[0]!r} on the way",
                cure='AttributeSchedule(..., paths=["net.3.p"])',
            ) from error

    def _callback(self, wanted: str, trainer: pl.Trainer) -> Any:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if wanted in (type(callback).__name__, getattr(callback, "name", None)):
                return callback
        known = ", ".join(type(callback).__name__ for callback in callbacks)
        raise ArgumentError(
            self,
            f"sets an attribute of the callback {wanted!r}, and the Trainer has {known}",
            cure='AttributeSchedule(..., paths=["callbacks.Mixup.alpha"])',
        )

    def _read(self, name: str, owner: Any, attribute: str) -> Any:
        value = getattr(owner, attribute, None)
        if self.takes_schedules and isinstance(value, Schedule):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
        found = f"is {value!r}" if hasattr(owner, attribute) else "does not exist"
        raise ArgumentError(
            self,
            f"sets {name!r}, which must be a number and {found} in {type(owner).__name__}",
            cure=f"{type(self).__name__}(...)  # name an attribute that holds a number",
        )

    def __getstate__(self) -> dict[str, Any]:
        # The targets belong to the module of the run.
        return {**super().__getstate__(), "_targets": {}, "_own": {}, "_written": None}


def dropout_rates(
    module: nn.Module, pattern: str | None = None, attributes: Sequence[str] = ()
) -> dict[str, Target]:
    """Every drop rate that layers of a module keep, by path: dropout, attention, drop path.

    Args:
        module: where to look.
        pattern: a regular expression that has to occur in the layer's name.
        attributes: further attributes that count in any layer that has them.
    """
    return {
        f"{path}.{attribute}": (layer, attribute)
        for path, layer in module.named_modules()
        if pattern is None or re.search(pattern, path)
        for attribute in _rates(layer, attributes)
    }


def _rates(layer: nn.Module, attributes: Sequence[str]) -> Iterator[str]:
    if isinstance(layer, _DropoutNd):
        yield "p"
    if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)):
        yield "dropout"
    for attribute in ("drop_prob", *attributes):
        # A module of that name is a layer of its own, and comes along by itself.
        if isinstance(getattr(layer, attribute, None), (int, float)):
            yield attribute


__all__ = ["AttributeSchedule", "Target", "dropout_rates"]
