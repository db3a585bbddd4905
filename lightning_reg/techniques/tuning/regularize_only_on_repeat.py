"""Leaves regularization off while samples are new."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Regularizer, Schedule, Signals, Step
from lightning_reg.engine.errors import check_range
from lightning_reg.engine.schedule import ScaledSchedule
from lightning_reg.engine.technique import Semantics
from lightning_reg.mechanisms.attribute_schedule import AttributeSchedule, Target, dropout_rates
from lightning_reg.mechanisms.seen_samples import SeenSamples

__all__ = ["RegularizeOnlyOnRepeat", "repeat_factor"]

Unit = Literal["sample", "epoch"]
_UNITS = ("sample", "epoch")


def repeat_factor(repeated: float, strength: float = 1.0) -> float:
    """``1 - strength (1 - r)``, what regularization is multiplied with.

    Args:
        repeated: ``r``, the share of a batch that was trained on before, in [0, 1].
        strength: how much of the regularization is held back from new samples, in [0, 1].

    Returns:
        In [0, 1]; 1 where every sample is repeated.
    """
    return 1 - strength * (1 - repeated)


class RegularizeOnlyOnRepeat(AttributeSchedule):
    """Multiplies dropout and the strengths of other techniques by ``1[samples are repeated]``.

    Komatsuzaki (2019), One Epoch Is All You Need, arXiv:1906.06669.

    A network that sees every sample once cannot overfit, and regularization "does nothing but slow
    down the training" (abstract). So it stays off as long as samples are new, and comes on when
    they come again. For a batch of both kinds the factor is the share ``r`` of repeated samples,
    the mean of the paper's condition. The rule is made of the abstract; the paper has no schedule
    of this kind, and no code to check against.

    Args:
        strength: how much is held back from new samples, in [0, 1], or a Schedule: 1 all of it, 0
            turns the technique off.
        techniques: names (``reg/<name>``) of techniques of this Trainer whose strength, a number or
            a Schedule, is multiplied; for dropout-like ones it is the rate.
        dropout: whether to multiply all drop rates that layers of the module keep (dropout,
            attention, drop path).
        paths: dotted paths of further attributes, from the module (``"net.3.p"``) or from a
            callback (``"callbacks.Mixup.alpha"``).
        unit: how repeats are told. ``"sample"``: by the index of each sample, exactly, also where
            an epoch is not a pass over the data (streams, replacement, several shards); needs an
            ``IndexedDataset``. ``"epoch"``: all samples are new in epoch 0 and repeated from then
            on; for a stream that never ends its first epoch that is off throughout.
        signals: where ``sample_index`` is.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range; before training, if a technique or an
            attribute is not there, or nothing is multiplied.
        MissingSignalError: in the first step, without an index for ``unit="sample"``.

    Note:
        ``reg/regularize_only_on_repeat`` logs the factor. Over ranks: global; a sample that any
        rank has trained on is repeated for all. What was seen is saved, so that a resumed run goes
        on exactly; a fit on other data needs a new instance. Samples that a DistributedSampler
        repeats to fill its last batch count as repeats. All passes of a step (SAM) have one
        factor; under accumulation each micro-batch has its own. Closed loops in a strength go on
        steering. Cost of ``"sample"``: a gather of positions and a host sync per micro-batch, a
        byte a sample. Own values come back when the fit is over.

        A technique at strength 0 is off altogether: what it would learn from new samples
        (a memory, an average) starts with the repeats. It hurts where regularization was there
        for something else than over-fitting: robustness, calibration, sparsity.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import L2Penalty, RegularizeOnlyOnRepeat
        >>> gate = RegularizeOnlyOnRepeat(techniques=["l2_penalty"], dropout=False)
        >>> trainer = L.Trainer(callbacks=[L2Penalty(1e-4), gate], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper("One Epoch Is All You Need", "Komatsuzaki", 2019, "1906.06669"),
    )
    semantics: ClassVar[Semantics] = "global"
    needs: ClassVar[tuple[str, ...]] = ("sample_index",)
    exemptions: ClassVar[Mapping[str, str]] = {
        "gradient": "a factor of strengths has nothing to differentiate",
    }
    takes_schedules: ClassVar[bool] = True
    function: ClassVar[Callable[..., Any] | None] = staticmethod(repeat_factor)
    explanation: ClassVar[str] = "multiplies strengths by the share of samples that are repeated"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        techniques: Sequence[str] = (),
        dropout: bool = True,
        paths: Sequence[str] = (),
        unit: Unit = "sample",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, paths=paths, relative=True, name=name)
        cure = 'RegularizeOnlyOnRepeat(techniques=["l2_penalty"], unit="epoch")'
        if not isinstance(strength, Schedule):
            check_range(self, "strength", strength, 0, 1, cure=cure)
        if isinstance(techniques, str):
            problem = f"`techniques` must be a list of names, got {techniques!r}"
            raise ArgumentError(self, problem, cure=cure)
        if unit not in _UNITS:
            problem = f"`unit` must be one of {', '.join(_UNITS)}, got {unit!r}"
            raise ArgumentError(self, problem, cure=cure)
        self.signals = signals
        self.techniques, self.dropout, self.unit = list(techniques), dropout, unit
        self._samples = SeenSamples()

    def targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, Target]:
        """The strengths, drop rates and attributes."""
        found: dict[str, Target] = {}
        for name in self.techniques:
            found[name] = (self._technique(name, trainer), "strength")
        if self.dropout:
            found.update(dropout_rates(pl_module))
        found.update({p: self._target(p, trainer, pl_module) for p in self.paths})
        if not found:
            raise ArgumentError(
                self,
                f"finds nothing to multiply: no dropout layer in {type(pl_module).__name__}, and "
                "no names in `techniques` or `paths`",
                cure='RegularizeOnlyOnRepeat(techniques=["l2_penalty"])',
            )
        return found

    def scheduled(self, step: Step) -> float:
        """The factor of this micro-batch."""
        if self.unit == "epoch":
            repeated = float(step.epoch > 0)
        else:
            repeated = self._samples.share(self._index(step), step.comm)
        return repeat_factor(repeated, step.strength(self))

    def value(self, own: Any, scheduled: float) -> Any:
        """A number or a schedule, multiplied."""
        return ScaledSchedule(own, scheduled) if isinstance(own, Schedule) else own * scheduled

    def logged(self, scheduled: float) -> float:
        """The factor."""
        return scheduled

    def state_dict(self) -> dict[str, Any]:
        """What was seen."""
        return {**super().state_dict(), **self._samples.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was seen."""
        super().load_state_dict(state_dict)
        self._samples.load_state_dict(state_dict)

    def _technique(self, name: str, trainer: pl.Trainer) -> Regularizer:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, Regularizer) and c is not self]
        named = {technique.name: technique for technique in others}
        if name not in named:
            known = ", ".join(named) or "no other technique"
            raise ArgumentError(
                self,
                f"multiplies the strength of {name!r}, and the Trainer has {known}",
                cure=f"RegularizeOnlyOnRepeat(techniques=[{next(iter(named), 'l2_penalty')!r}])",
            )
        return named[name]

    @staticmethod
    def _index(step: Step) -> Tensor:
        index = step.sample_index
        # Asked for by name, an index that is not there is an error which says how to get one.
        found: Tensor = index if index is not None else step.given_signal("sample_index")
        return found
