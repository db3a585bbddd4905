"""Techniques that learn from trained networks which the user hands over.

:class:`GivenTeacher` has one, or a copy of the module in its place; :class:`GivenTeachers` has
several, each with a role. The mechanism takes care of

- the networks: frozen, in eval mode, on the module's device and in its type, no part of the
  module, its optimizer, its checkpoint or DDP;
- a resume: a given network is not saved, and the run refuses to go on with another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_reg.engine import (
    ArgumentError,
    RegularizationError,
    Regularizer,
    Schedule,
    Signals,
    Step,
    UnsupportedError,
)
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.signals import logits_of
from lightning_reg.engine.step import full_precision
from lightning_reg.mechanisms.teacher import FrozenNetwork, Source, Teacher


class GivenNetwork(FrozenNetwork):
    """A frozen network of the user's."""

    def mark(self) -> Tensor:
        """Sums by which two networks are told apart, whatever device and type they are on."""
        weights = [p.detach().double() for p in self.network.parameters()]
        sums = [torch.stack([w.sum(), w.square().sum()]).cpu() for w in weights]
        return torch.stack(sums) if sums else torch.zeros(0, 2, dtype=torch.float64)

    def check(self, owner: object, saved: Tensor | None, role: str = "teacher") -> None:
        """Raise unless the mark that was saved, if any, is this network's."""
        if saved is not None and not torch.equal(saved, self.mark()):
            raise RegularizationError(
                owner,
                f"the {role} is not the one of the checkpoint: their weights differ",
                cure=f"{role}.load_state_dict(...) before the Trainer is made",
            )


def check_network(owner: object, network: object, argument: str = "teacher") -> None:
    """Raise :class:`ArgumentError` unless ``network`` is a torch module."""
    if not isinstance(network, nn.Module):
        raise ArgumentError(
            owner,
            f"`{argument}` must be a torch module, got {type(network).__name__}",
            cure=f"{type(owner).__name__}({argument}=network)",
        )


class GivenTeacher(Teacher):
    """Base of techniques with a given teacher, or with one that is a copy of the module.

    Args:
        strength: the multiplier, at least 0.
        teacher: the network to learn from.
        source: a copy of the module in place of a ``teacher``: ``"ema"``, ``"past"``,
            ``"reference"`` or ``"random"``.
        decay: of the average of ``"ema"``.
        signals: where ``inputs`` and other signals are.
        name: the name in logs and checkpoints.
        others: arguments of the next base, where a technique has several.
    """

    def __init__(
        self,
        strength: float | Schedule,
        *,
        teacher: nn.Module | None = None,
        source: Source | None = None,
        decay: float = 0.999,
        signals: Signals | None = None,
        name: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__(strength, source=source, decay=decay, signals=signals, name=name, **others)
        owner = type(self).__name__
        if (teacher is None) == (source is None):
            raise ArgumentError(
                self,
                "needs a `teacher` or a `source`, one of the two",
                cure=f'{owner}(teacher=network), or {owner}(source="reference")',
            )
        if teacher is not None:
            check_network(self, teacher)
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, cure=f'{owner}(1.0, source="reference")')
        self.given = None if teacher is None else GivenNetwork(teacher)
        self._loaded_mark: Tensor | None = None

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the given network, or make the copy."""
        super().on_reference(trainer, pl_module)
        if self.given is None:
            return
        self.given.check(self, self._loaded_mark)
        self._loaded_mark = None
        self.teacher = self.given

    def state_dict(self) -> dict[str, Any]:
        """The weights of a copy; of a given network only what tells it from another."""
        if self.given is None:
            return super().state_dict()
        kept, self.teacher = self.teacher, None
        state = super().state_dict()
        self.teacher = kept
        return {**state, "mark": self.given.mark()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what is needed until training starts."""
        super().load_state_dict(state_dict)
        self._loaded_mark = state_dict.get("mark")


class GivenTeachers(Regularizer):
    """Base of techniques that learn from several given networks.

    Args:
        strength: what the technique makes of it.
        teachers: the networks, each by its role, which is the name of its argument.
        signals: where ``inputs`` and other signals are.
        name: the name in logs and checkpoints.
        others: arguments of the next base, where a technique has several.

    Attributes:
        teachers: the frozen networks by role.
    """

    def __init__(
        self,
        strength: float | Schedule,
        *,
        teachers: Mapping[str, nn.Module],
        signals: Signals | None = None,
        name: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__(strength, signals=signals, name=name, **others)
        for role, network in teachers.items():
            check_network(self, network, role)
        self.teachers = {role: GivenNetwork(network) for role, network in teachers.items()}
        self._loaded_marks: Mapping[str, Tensor] = {}

    def answer(self, role: str, step: Step, inputs: Any) -> Tensor:
        """What a teacher says of ``inputs``, without a graph, of the shape of ``step.logits``."""
        own = step.logits
        found = logits_of(self.teachers[role](inputs, step.module))
        if found is None or found.shape != own.shape:
            kind = UnsupportedError if found is None else RegularizationError
            shape = "no tensor" if found is None else f"{tuple(found.shape)}"
            raise kind(
                self,
                f"the {role} answers {shape}, and the outputs of {step.hook} are "
                f"{tuple(own.shape)}",
                cure=f"a {role} whose `forward` returns outputs of the module's shape",
            )
        return full_precision(found)

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the networks are those of the checkpoint."""
        super().on_reference(trainer, pl_module)
        for role, network in self.teachers.items():
            network.check(self, self._loaded_marks.get(role), role)
        self._loaded_marks = {}

    def state_dict(self) -> dict[str, Any]:
        """What tells each network from another."""
        marks = {role: network.mark() for role, network in self.teachers.items()}
        return {**super().state_dict(), "marks": marks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the marks until training starts."""
        super().load_state_dict(state_dict)
        self._loaded_marks = dict(state_dict["marks"])


__all__ = ["GivenNetwork", "GivenTeacher", "GivenTeachers", "check_network"]
