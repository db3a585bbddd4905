"""Numbers that change over a run: strengths, and attributes of modules and callbacks."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from lightning_reg.engine.errors import ArgumentError, check_range

if TYPE_CHECKING:
    from lightning_reg.engine.closed_loop import ClosedLoop

By = Literal["step", "epoch", "progress"]
_BY = ("step", "epoch", "progress")


class Schedule(ABC):
    """A number as a function of the position in the run.

    Pass one wherever a technique takes a ``strength``. Positions are optimizer steps, epochs
    (both from 0) or the share of the planned run that is done; a schedule keeps no state unless
    it is a :class:`ClosedLoop`, so it survives a resume as it is.
    """

    @abstractmethod
    def value(self, *, step: int = 0, epoch: int = 0, progress: float = 0.0) -> float:
        """The number at a position.

        Args:
            step: optimizer steps done.
            epoch: the current epoch.
            progress: the share of the planned run that is done, in [0, 1].
        """

    def loops(self) -> list[ClosedLoop]:
        """The closed loops in it, which a technique shows each validation."""
        return []

    @staticmethod
    def of(value: float | Schedule) -> Schedule:
        """A schedule from what a user passed: one as it is, or a constant."""
        return value if isinstance(value, Schedule) else ConstantSchedule(value)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({shown})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class ConstantSchedule(Schedule):
    """The same number throughout.

    Args:
        constant: the number.
    """

    def __init__(self, constant: float) -> None:
        check_range(self, "constant", constant)
        self.constant = constant

    def value(self, *, step: int = 0, epoch: int = 0, progress: float = 0.0) -> float:
        """The constant."""
        return self.constant


class _Interval(Schedule):
    """From ``initial`` at ``start`` to ``final`` at ``end``; constant before and after."""

    def __init__(
        self,
        initial: float,
        final: float,
        *,
        start: float = 0.0,
        end: float | None = None,
        by: By = "progress",
    ) -> None:
        check_range(self, "initial", initial)
        check_range(self, "final", final)
        _check_by(self, by)
        if end is None and by != "progress":
            raise ArgumentError(
                self,
                f"`end` must be given with by={by!r}: the {by} at which {final} is reached",
                cure=f"{type(self).__name__}({initial}, {final}, end=100, by={by!r})",
            )
        check_range(self, "start", start, 0)
        check_range(self, "end", 1.0 if end is None else end, start, low_open=True)
        self.initial = initial
        self.final = final
        self.start = start
        self.end = 1.0 if end is None else end
        self.by = by

    def value(self, *, step: int = 0, epoch: int = 0, progress: float = 0.0) -> float:
        """The number at a position."""
        position = _position(self.by, step, epoch, progress)
        share = (position - self.start) / (self.end - self.start)
        # The ends are returned as they were given: interpolation would round them.
        if share <= 0:
            return self.initial
        return self.final if share >= 1 else self._between(share)

    @abstractmethod
    def _between(self, share: float) -> float:
        """The number when ``share`` of the interval is done, in (0, 1)."""


class LinearSchedule(_Interval):
    """Goes in a straight line from one number to another.

    Args:
        initial: the number up to ``start``.
        final: the number from ``end`` on.
        start: where the change begins, in units of ``by``.
        end: where it is complete; the end of the run by default with ``by="progress"``.
        by: ``"step"`` (optimizer steps), ``"epoch"`` or ``"progress"``.

    Example:
        >>> LinearSchedule(0.0, 1.0, start=0, end=100, by="step").value(step=25)
        0.25
    """

    def _between(self, share: float) -> float:
        return self.initial + (self.final - self.initial) * share


class CosineSchedule(_Interval):
    """Goes along half a cosine from one number to another, slowly at both ends.

    Args:
        initial: the number up to ``start``.
        final: the number from ``end`` on.
        start: where the change begins, in units of ``by``.
        end: where it is complete; the end of the run by default with ``by="progress"``.
        by: ``"step"`` (optimizer steps), ``"epoch"`` or ``"progress"``.

    Example:
        >>> CosineSchedule(1.0, 0.0).value(progress=0.5)
        0.5
    """

    def _between(self, share: float) -> float:
        return self.final + (self.initial - self.final) * 0.5 * (1 + math.cos(math.pi * share))


class ExponentialSchedule(_Interval):
    """Goes by equal factors from one positive number to another.

    Args:
        initial: the number up to ``start``, above 0.
        final: the number from ``end`` on, above 0.
        start: where the change begins, in units of ``by``.
        end: where it is complete; the end of the run by default with ``by="progress"``.
        by: ``"step"`` (optimizer steps), ``"epoch"`` or ``"progress"``.

    Example:
        >>> round(ExponentialSchedule(1.0, 0.01).value(progress=0.5), 10)
        0.1
    """

    def __init__(
        self,
        initial: float,
        final: float,
        *,
        start: float = 0.0,
        end: float | None = None,
        by: By = "progress",
    ) -> None:
        super().__init__(initial, final, start=start, end=end, by=by)
        check_range(self, "initial", initial, 0, low_open=True)
        check_range(self, "final", final, 0, low_open=True)

    def _between(self, share: float) -> float:
        return float(self.initial * (self.final / self.initial) ** share)


class WarmupSchedule(Schedule):
    """Rises in a straight line from 0, then follows another schedule or stays.

    Args:
        after: the number, or the schedule, that is warmed up to; it is multiplied by the share
            of the warm-up that is done.
        length: how long the warm-up takes, in units of ``by``.
        by: ``"step"`` (optimizer steps), ``"epoch"`` or ``"progress"``.

    Example:
        >>> WarmupSchedule(0.5, length=10, by="epoch").value(epoch=5)
        0.25
    """

    def __init__(self, after: float | Schedule, *, length: float, by: By = "step") -> None:
        _check_by(self, by)
        check_range(self, "length", length, 0, low_open=True)
        self.after = after
        self.length = length
        self.by = by
        Schedule.of(after)

    def loops(self) -> list[ClosedLoop]:
        """Those of the schedule that is warmed up to."""
        return Schedule.of(self.after).loops()

    def value(self, *, step: int = 0, epoch: int = 0, progress: float = 0.0) -> float:
        """The number at a position."""
        after = Schedule.of(self.after).value(step=step, epoch=epoch, progress=progress)
        share = _position(self.by, step, epoch, progress) / self.length
        return after if share >= 1 else after * share


class ScaledSchedule(Schedule):
    """A schedule times a number.

    Args:
        schedule: the number or the schedule that is scaled.
        factor: what it is multiplied with.

    Example:
        >>> ScaledSchedule(LinearSchedule(0.0, 1.0), 0.5).value(progress=0.5)
        0.25
    """

    def __init__(self, schedule: float | Schedule, factor: float) -> None:
        check_range(self, "factor", factor)
        self.schedule = schedule
        self.factor = factor
        Schedule.of(schedule)

    def loops(self) -> list[ClosedLoop]:
        """Those of the schedule that is scaled."""
        return Schedule.of(self.schedule).loops()

    def value(self, *, step: int = 0, epoch: int = 0, progress: float = 0.0) -> float:
        """The number at a position."""
        own = Schedule.of(self.schedule).value(step=step, epoch=epoch, progress=progress)
        return own * self.factor


class StepSchedule(Schedule):
    """Jumps at milestones: ``values[i]`` holds from ``milestones[i - 1]`` to ``milestones[i]``.

    Args:
        values: one number more than there are milestones.
        milestones: rising positions, in units of ``by``.
        by: ``"step"`` (optimizer steps), ``"epoch"`` or ``"progress"``.

    Example:
        >>> StepSchedule([0.0, 1.0], [60], by="epoch").value(epoch=60)
        1.0
    """

    def __init__(
        self, values: Sequence[float], milestones: Sequence[float], *, by: By = "epoch"
    ) -> None:
        _check_by(self, by)
        rising = all(a < b for a, b in itertools.pairwise(milestones))
        if len(values) != len(milestones) + 1 or not rising:
            raise ArgumentError(
                self,
                f"needs rising `milestones` and one value more than milestones, got {values!r} "
                f"and {milestones!r}",
                cure='StepSchedule([0.0, 1.0], [60], by="epoch")',
            )
        for number in values:
            check_range(self, "values", number)
        self.values = list(values)
        self.milestones = list(milestones)
        self.by = by

    def value(self, *, step: int = 0, epoch: int = 0, progress: float = 0.0) -> float:
        """The number at a position."""
        position = _position(self.by, step, epoch, progress)
        return self.values[sum(position >= milestone for milestone in self.milestones)]


class CallableSchedule(Schedule):
    """Any function of the position.

    Args:
        function: takes the position and gives the number; a module-level function, so that the
            run can be pickled and written to YAML by its import path.
        by: ``"step"`` (optimizer steps), ``"epoch"`` or ``"progress"``: the position it gets.

    Example:
        >>> import math
        >>> CallableSchedule(math.sqrt, by="step").value(step=9)
        3.0
    """

    def __init__(self, function: Callable[[float], float], *, by: By = "progress") -> None:
        _check_by(self, by)
        if not callable(function):
            raise ArgumentError(
                self,
                f"`function` must be callable, got {function!r}",
                cure='CallableSchedule(math.sqrt, by="step")',
            )
        self.function = function
        self.by = by

    def value(self, *, step: int = 0, epoch: int = 0, progress: float = 0.0) -> float:
        """The number at a position."""
        return float(self.function(_position(self.by, step, epoch, progress)))


def _check_by(owner: Schedule, by: str) -> None:
    if by not in _BY:
        raise ArgumentError(
            owner,
            f"`by` must be one of {', '.join(_BY)}, got {by!r}",
            cure=f'{type(owner).__name__}(..., by="step")',
        )


def _position(by: By, step: int, epoch: int, progress: float) -> float:
    return {"step": step, "epoch": epoch, "progress": progress}[by]
