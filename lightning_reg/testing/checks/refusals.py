"""Does it refuse what cannot work, in time and in words that help, and survive a NaN?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_reg.engine.errors import (
    ArgumentError,
    MissingSignalError,
    RegularizationError,
)
from lightning_reg.engine.regularizer import WEIGHT_PHASES
from lightning_reg.testing.hosts import BATCH, ContractHost, HostOptions
from lightning_reg.testing.runs import Run, Setting, StateKeeper
from lightning_reg.testing.snapshot import equal, first_difference, numbers_of
from lightning_reg.testing.subject import PLAIN, Subject

_NAN_STEP = 1


def arguments(subject: Subject) -> None:
    """Wrong arguments are refused by the constructor, or before the first step, with a cure."""
    taken = inspect.signature(subject.cls.__init__).parameters
    bad: list[Mapping[str, Any]] = list(subject.case.bad)
    if "strength" in taken or "strength" in subject.case.args:
        bad += [{"strength": float("nan")}, {"strength": float("inf")}]
    if not bad:
        raise subject.fail("the case has no `bad` arguments, so nothing shows that it validates")
    for changes in bad:
        _check_refused(subject, changes, partial(_construct, subject, changes))
    for changes in subject.case.bad_late:
        _check_refused_late(subject, changes)
    if subject.kind != "mixin":
        _check_unknown(subject)


def signals(subject: Subject) -> None:
    """A signal that is missing is named at the first step, with the line to add."""
    for signal in missing_signals(subject):
        setting = Setting(options=HostOptions(omit=signal))
        run = subject.run(setting)
        try:
            run.go()
        except MissingSignalError as error:
            _check_text(subject, error, f"without {signal!r}")
            if signal not in str(error):
                raise subject.fail(
                    f"without {signal!r} the error does not name it: {error}"
                ) from error
            if run.trainer.global_step > 0:
                raise subject.fail(
                    f"the missing {signal!r} was noticed after {run.trainer.global_step} steps"
                ) from error
        except Exception as error:
            raise subject.fail(
                f"without {signal!r} it fails with {type(error).__name__}: {error}. Read signals "
                "through `step`, which raises MissingSignalError"
            ) from error
        else:
            raise subject.fail(
                f"it declares that it needs {signal!r}, and trains without it and without a word"
            )


def non_finite(subject: Subject) -> None:
    """A NaN batch neither reaches the technique's state nor stops a run that fp16 would save."""
    for precision in ("32-true", "16-mixed"):
        if subject.kind == "test" and precision != "32-true":
            continue
        setting = Setting(options=HostOptions(nan_at=_NAN_STEP), precision=precision)
        technique = subject.technique()
        watching = _StateBeforeAndAfter(technique)
        try:
            outcome = subject.run(setting, technique=technique, after=[watching]).go()
        except Exception as error:
            raise subject.fail(
                f"a batch of NaN under {precision} stops the run with {type(error).__name__}: "
                f"{error}. Without the technique it goes on, and a scaler would skip the step"
            ) from error
        _check_state(subject, watching, precision)
        baseline = subject.baseline(setting)
        survives = all(bool(w.isfinite().all()) for w in baseline.weights.values())
        for name, weight in outcome.weights.items():
            if survives and not weight.isfinite().all():
                raise subject.fail(
                    f"under {precision} a run without the technique survives a batch of NaN, and "
                    f"with it {name} is not finite: it changes weights where the step was skipped"
                )
        if outcome.state and subject.kind == "callback" and precision == "32-true":
            _check_one_rank(subject)


def missing_signals(subject: Subject) -> list[str]:
    """The declared needs that the case's host has a variant without."""
    host = subject.case.host(HostOptions())
    omits = getattr(host, "omits", ContractHost.omits)
    return [signal for signal in subject.cls.needs if signal in omits]


# ---------------------------------------------------------------------- refusals


def _construct(subject: Subject, changes: Mapping[str, Any]) -> Any:
    if subject.kind == "mixin":
        return subject.module(PLAIN.options, **changes)
    return subject.technique(**changes)


def _check_refused(subject: Subject, changes: Mapping[str, Any], make: Callable[[], Any]) -> None:
    try:
        make()
    except ArgumentError as error:
        _check_text(subject, error, f"{dict(changes)}")
    except Exception as error:
        raise subject.fail(
            f"{dict(changes)} raises {type(error).__name__} instead of ArgumentError: {error}"
        ) from error
    else:
        raise subject.fail(f"{dict(changes)} is accepted by the constructor")


def _check_refused_late(subject: Subject, changes: Mapping[str, Any]) -> None:
    try:
        run: Run = subject.run(changes=changes)
    except Exception as error:
        raise subject.fail(
            f"{dict(changes)} is in `bad_late` and the constructor raises already: {error}. "
            "Move it to `bad`"
        ) from error
    try:
        run.go()
    except RegularizationError as error:
        _check_text(subject, error, f"{dict(changes)}")
        if getattr(run.module, "seen", ()):
            raise subject.fail(
                f"{dict(changes)} is refused after the first batch only: refuse in `validate`"
            ) from error
    except Exception as error:
        raise subject.fail(
            f"{dict(changes)} raises {type(error).__name__} instead of RegularizationError: {error}"
        ) from error
    else:
        raise subject.fail(f"{dict(changes)} is accepted, and the run goes through")


def _check_unknown(subject: Subject) -> None:
    try:
        subject.technique(no_such_argument=1)
    except TypeError:
        return
    raise subject.fail(
        "an argument that it does not have is swallowed, so a typing error changes nothing and "
        "is not noticed: pass `**kwargs` on to Regularizer, or leave them out"
    )


def _check_text(subject: Subject, error: Exception, occasion: str) -> None:
    text = str(error)
    if subject.name not in text or "Try:" not in text:
        raise subject.fail(
            f"{occasion}: the error must name {subject.name} and end with a cure (`Try: ...`); "
            f"it says: {text}"
        ) from error


# ---------------------------------------------------------------------- NaN


def _check_one_rank(subject: Subject) -> None:
    """A NaN that only one rank sees: both keep the same, finite state."""
    setting = Setting(options=HostOptions(nan_at=_NAN_STEP, nan_rank=0), batch=BATCH // 2)
    one, other = subject.rank_outcomes(setting)
    states = numbers_of(one.state), numbers_of(other.state)
    difference = first_difference(*states)
    if difference is not None:
        raise subject.fail(
            f"after a batch of NaN on one of two ranks their states differ: {difference}. Whether "
            "a value is finite has to be decided for all ranks together (`step.comm.any`)"
        )
    for name, number in states[0].items():
        if _learns_from_batches(subject) and not bool(torch.isfinite(number).all()):
            raise subject.fail(
                f"after a batch of NaN on one of two ranks the state {name} is not finite on both"
            )


class _StateBeforeAndAfter(StateKeeper):
    """Keeps the technique's state in front of the NaN batch, and behind it."""

    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In front."""
        if batch_idx == _NAN_STEP:
            self._keep()
            self.before = self.state

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Behind."""
        if self.before is not None and self.after is None:
            self._keep()
            self.after = self.state


def _learns_from_batches(subject: Subject) -> bool:
    """Whether its state is made of batches only, and not of weights, which may be NaN as well."""
    return not subject.overrides(*WEIGHT_PHASES)


def _check_state(subject: Subject, watching: _StateBeforeAndAfter, precision: str) -> None:
    from_batches = _learns_from_batches(subject)
    # In float32 the optimizer itself makes NaN of the weights; a scaler skips that step.
    weights_survive = precision == "16-mixed"
    for name, number in numbers_of(watching.state).items():
        if (from_batches or weights_survive) and not bool(torch.isfinite(number).all()):
            raise subject.fail(
                f"after a batch of NaN under {precision} its state {name} is not finite, and the "
                "rest of the run computes with it"
            )
    before, after = numbers_of(watching.before), numbers_of(watching.after)
    for name in before.keys() & after.keys() if from_batches else ():
        if not equal(before[name], after[name]):
            raise subject.fail(
                f"a batch of NaN under {precision} changed its state {name}: nothing finite "
                "could be learnt from that batch"
            )
