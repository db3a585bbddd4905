"""Which technique acts in which phase and in what order, and what excludes what."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lightning.pytorch.callbacks import Callback

from lightning_reg.engine.errors import ConflictError
from lightning_reg.engine.regularizer import PHASES, Regularizer, overrides

_AVERAGING_CALLBACKS = ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")


@dataclass(frozen=True)
class Plan:
    """Techniques in the order in which they act, and the phases of each.

    The order follows from what techniques declare to read and write, then from their names: the
    callbacks list has no say, so every permutation of it trains the same weights.
    """

    techniques: tuple[Regularizer, ...]
    phases: dict[str, tuple[Regularizer, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, callbacks: Iterable[Callback]) -> Plan:
        """Plan the techniques among ``callbacks``.

        Raises:
            ConflictError: if two of them share a name or exclude each other.
        """
        callbacks = list(callbacks)
        techniques = [c for c in callbacks if isinstance(c, Regularizer)]
        _check_names(techniques)
        _check_exclusive(techniques)
        _check_averaging(techniques, callbacks)
        ordered = tuple(_order(techniques))
        phases = {phase: tuple(t for t in ordered if overrides(t, phase)) for phase in PHASES}
        return cls(ordered, phases)


def _check_names(techniques: Sequence[Regularizer]) -> None:
    seen: dict[str, Regularizer] = {}
    for technique in techniques:
        if technique.name in seen:
            raise ConflictError(
                technique,
                f"two techniques are named {technique.name!r}; logs and checkpoints could not "
                "tell them apart",
                cure=f'{type(technique).__name__}(..., name="{technique.name}_2")',
            )
        seen[technique.name] = technique


def _check_exclusive(techniques: Sequence[Regularizer]) -> None:
    holder: dict[str, Regularizer] = {}
    for technique in techniques:
        for tag in sorted(technique.exclusive):
            if tag in holder:
                other = holder[tag]
                raise ConflictError(
                    technique,
                    f"excludes {type(other).__name__}: {_reason(tag)}",
                    cure=_cure(tag, technique, other),
                )
            holder[tag] = technique


def _check_averaging(techniques: Sequence[Regularizer], callbacks: Sequence[Callback]) -> None:
    averaging = [t for t in techniques if "weight_averaging" in t.exclusive]
    others = [type(c).__name__ for c in callbacks if type(c).__name__ in _AVERAGING_CALLBACKS]
    if averaging and others:
        raise ConflictError(
            averaging[0],
            f"excludes Lightning's {others[0]}: both swap averaged weights in and out",
            cure=f"remove {others[0]} from the callbacks",
        )


_REASONS = {
    "batch_mixing": "both mix the samples of a batch, and mixed samples cannot be mixed again",
    "label_smoothing": "both soften the same labels, so the smoothing would count twice",
    "criterion": "both replace the loss, and there is only one",
    "reweighting": "both weight the samples of the loss, and weights of one would undo the other's",
    "weight_perturbation": "both run the step again, and one's pass lacks what the other adds",
    "weight_averaging": "both swap averaged weights in and out",
}


def _reason(tag: str) -> str:
    return _REASONS.get(tag, f"both claim {tag.replace('_', ' ')}")


def _cure(tag: str, one: Regularizer, other: Regularizer) -> str:
    names = f"{type(other).__name__}(...), {type(one).__name__}(...)"
    if tag == "batch_mixing":
        return f"MixSwitch([{names}])"
    return f"keep one of {type(other).__name__} and {type(one).__name__}"


def _key(technique: Regularizer) -> tuple[str, str]:
    return type(technique).__qualname__, technique.name


def _before(one: Regularizer, other: Regularizer) -> bool:
    """Whether ``other`` reads what ``one`` writes, and not the other way round as well."""
    return bool(one.writes & other.reads) and not other.writes & one.reads


def _order(techniques: Sequence[Regularizer]) -> list[Regularizer]:
    """Topological order by declared effects; ties, and cycles, go by class and name."""
    rest = sorted(techniques, key=_key)
    waiting = {id(t): sum(_before(o, t) for o in rest if o is not t) for t in rest}
    ready = [(_key(t), i) for i, t in enumerate(rest) if waiting[id(t)] == 0]
    heapq.heapify(ready)
    done: list[Regularizer] = []
    left = dict(enumerate(rest))
    while left:
        index = heapq.heappop(ready)[1] if ready else min(left)
        if index not in left:
            continue
        chosen = left.pop(index)
        done.append(chosen)
        for i, technique in left.items():
            if _before(chosen, technique):
                waiting[id(technique)] -= 1
                if waiting[id(technique)] == 0:
                    heapq.heappush(ready, (_key(technique), i))
    return done
