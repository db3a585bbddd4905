"""A pull towards what an earlier state of the module says of the same inputs.

A technique supplies :meth:`OutputAnchor.distance`: one number per row of the outputs now and
then. The mechanism takes care of

- the reference: a frozen copy of the module (:mod:`~lightning_reg.mechanisms.teacher`), taken at
  the end of each fit, kept for the next one and in ``state_dict``, never taken again on a resume;
- what is compared: logits, or the output of a layer, in float32 at least, with gradients through
  the module only;
- classes: a head that grew since is compared on the classes that the reference has; ``classes``
  narrows it to those that were taught before;
- logits (B, C), (B, T, C) or (B, C, H, W); positions that labels mark as ignored are left out;
- the mean over all ranks, each row counting once;
- a reference that is not finite: it is not taken, the one before stays.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_reg.engine import (
    ArgumentError,
    RegularizationError,
    Schedule,
    Signals,
    Step,
    UnsupportedError,
)
from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.step import full_precision
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.feature_penalty import check_layer
from lightning_reg.mechanisms.output_penalty import LogitRows
from lightning_reg.mechanisms.teacher import Teacher

Classes = int | Sequence[int] | None


class OutputAnchor(Teacher, LogitRows):
    """Base of techniques that add ``strength * mean_n d(f(x_n), f'(x_n))``, ``f'`` a past self.

    Args:
        strength: the multiplier.
        layer: the submodule whose output is compared; ``None`` compares logits.
        classes: the logits to compare, by position, or the number of the first ones; ``None``
            takes all that the reference has.
        from_start: take a reference from the weights that the first fit starts with; otherwise
            nothing happens in the first fit.
        ignore_index: positions with this integer label are left out of logits; ``None`` keeps
            all.
        class_dim: where the classes lie in logits of more than two dimensions. By default it
            follows from the shape of the labels.
        signals: where ``inputs``, ``logits`` and labels are, if not in the usual places.
        name: the name in logs and checkpoints.

    Attributes:
        teacher: the reference; ``None`` before one is taken.
        references_taken: how often one was taken.
    """

    semantics: ClassVar[Semantics] = "global"
    reads: ClassVar[frozenset[str]] = frozenset({"logits", "features"})

    def __init__(
        self,
        strength: float | Schedule,
        *,
        layer: str | None = None,
        classes: Classes = None,
        from_start: bool = False,
        ignore_index: int | None = -100,
        class_dim: int | None = None,
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            source="reference",
            ignore_index=ignore_index,
            class_dim=class_dim,
            signals=signals,
            name=name,
        )
        self._check_classes(classes)
        self.layer = layer
        self.classes = classes
        self.from_start = from_start
        self.references_taken = 0
        self._chosen: Tensor | None = None
        if layer is not None:
            self.needs = ("inputs", "features")  # type: ignore[misc]

    @property
    def layers(self) -> tuple[str, ...]:
        """The submodules to capture."""
        return () if self.layer is None else (self.layer,)

    @abstractmethod
    def distance(self, now: Tensor, then: Tensor) -> Tensor:
        """The distance (N,) of each row of outputs: logits (N, C), or features (N, ...)."""

    # ------------------------------------------------------------------ references

    def take_reference(self, module: pl.LightningModule) -> None:
        """Pull to what ``module`` says now; inside a distributed run, every rank has to call it.

        Args:
            module: is copied.
        """
        taken = self.copy_now(module)
        if taken is None:
            return
        self.teacher = taken
        self.references_taken += 1

    def on_reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the reference of a checkpoint, or the first one."""
        loaded = self._loaded_teacher
        if loaded is not None or (self.from_start and self.references_taken == 0):
            super().on_reference(trainer, pl_module)
            self.references_taken = max(1, self.references_taken)
        elif self.teacher is None:
            # What cannot be copied is better known now than at the end of the task.
            self._copy(pl_module)
        if loaded is not None:
            self._check_parts(loaded)
        self._chosen = self._positions(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of a task."""
        self.take_reference(pl_module)

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a module whose copy cannot answer, and a layer that is not there."""
        super().validate(trainer, pl_module)
        self._check_classes(self.classes)
        if self.layer is not None:
            check_layer(self, self.layer, pl_module, also='target="features", ')

    # ------------------------------------------------------------------ the pull

    def penalty(self, step: Step) -> JointMean | None:
        """Phase 4."""
        if self.teacher is None:
            return None
        now, then = self._logits(step) if self.layer is None else self._features(step, self.layer)
        return JointMean.of(self.distance(now, then))

    def _logits(self, step: Step) -> tuple[Tensor, Tensor]:
        """The rows that count, of the classes that count."""
        assert self.teacher is not None
        targets = step.find("targets")
        now = self._rows(step.logits, targets)
        then = self._rows(self._answer(self.teacher, step.inputs, step.module), targets)
        self._check_rows(step, now, then)
        if self._chosen is not None:
            return now.index_select(1, self._chosen), then.index_select(1, self._chosen)
        return now[:, : then.shape[1]], then

    def _features(self, step: Step, layer: str) -> tuple[Tensor, Tensor]:
        """The output of the layer, and that of the same layer of the reference."""
        assert self.teacher is not None
        now = step.feature(layer)
        calls = self.teacher.outputs_of(layer, step.inputs, step.module)
        if len(calls) != 1 or not isinstance(calls[0], Tensor):
            raise UnsupportedError(
                self,
                f"takes the features of its reference from `forward`, which has to call {layer!r} "
                f"once for one tensor, and made {len(calls)} calls",
                cure="def forward(self, x): return self.head(self.encoder(x))",
            )
        then = full_precision(calls[0])
        if then.shape != now.shape:
            raise RegularizationError(
                self,
                f"compares {layer!r}, which returns {tuple(now.shape)}, and {tuple(then.shape)} "
                "in the reference",
                cure=f'{type(self).__name__}(target="features", layer="<of constant width>")',
            )
        return now, then

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The reference's weights and buffers, and how often one was taken."""
        return {**super().state_dict(), "references_taken": self.references_taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the reference of a checkpoint, or of another technique of this class."""
        super().load_state_dict(state_dict)
        self.references_taken = int(state_dict["references_taken"])
        self.teacher = None

    # ------------------------------------------------------------------ checks

    def _positions(self, device: torch.device) -> Tensor | None:
        if self.classes is None:
            return None
        chosen = range(self.classes) if isinstance(self.classes, int) else self.classes
        return torch.tensor(list(chosen), device=device)

    def _check_classes(self, classes: Any) -> None:
        if classes is None:
            return
        found = list(classes) if isinstance(classes, (list, tuple, range)) else [classes]
        whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in found)
        if not whole or not found or len(set(found)) < len(found) or classes == 0:
            raise ArgumentError(
                self,
                f"`classes` must be a number of classes or their positions, got {classes!r}",
                cure=f"{type(self).__name__}(classes=10)",
            )

    def _check_rows(self, step: Step, now: Tensor, then: Tensor) -> None:
        if len(now) != len(then) or (self._chosen is None and then.shape[1] > now.shape[1]):
            raise RegularizationError(
                self,
                f"the reference answers {len(then)} rows of {then.shape[1]} classes, and the "
                f"logits of {step.hook} are {len(now)} rows of {now.shape[1]}",
                cure="def forward(self, x): ...  # returns the logits of training_step",
            )
        known = min(now.shape[1], then.shape[1])
        last = -1 if self.classes is None else max(_list(self.classes))
        if last >= known:
            raise ArgumentError(
                self,
                f"`classes` names class {last}, and the reference knows {known} classes",
                cure=f"{type(self).__name__}(classes={known})",
            )

    def _check_parts(self, loaded: dict[str, Tensor]) -> None:
        """A network that is rebuilt has to say what the saved one said."""
        assert self.teacher is not None
        own = self.teacher.state_dict().keys()
        new, gone = sorted(own - loaded.keys()), sorted(loaded.keys() - own)
        if gone:
            raise RegularizationError(
                self,
                f"the saved reference has {', '.join(gone[:4])}, and the module does not",
                cure="build the module with every part that it had in the task before",
            )
        if new and self.layer is None and self.classes is None:
            raise RegularizationError(
                self,
                f"the saved reference does not have {', '.join(new[:4])}, so which of the logits "
                "it knows has to be said",
                cure=f"{type(self).__name__}(classes=<the number of classes before>)",
            )


def _list(classes: int | Sequence[int]) -> list[int]:
    return list(range(classes)) if isinstance(classes, int) else list(classes)


__all__ = ["Classes", "OutputAnchor"]
