"""Numbers that change over a run: strengths, and attributes of modules and callbacks."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from lightning_reg.engine.errors import ArgumentError, RegularizationError, check_range

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


class ClosedLoop(Schedule):
    """Steers a number so that a monitored metric comes to a target.

    After each validation of a fit the number becomes ``number + gain * (metric - target)``, kept
    in ``[low, high]``: an integrating controller. With a positive gain it rises while the metric
    is above the target and falls while it is below; with a negative one the other way round.

    Where the metric answers to the number with slope ``-k`` (ECE falls by k for one unit of
    strength), the error shrinks by the factor ``1 - gain * k`` per validation: it vanishes without
    overshoot for ``gain <= 1 / k``, and swings ever wider above ``2 / k``. A metric that answers
    late needs a smaller gain, or ``patience``.

    Monitor what goes one way with the number. ECE is as large for too little confidence as for
    too much, so that a penalty on confidence can raise it and never learn of it;
    ``"val/overconfidence"`` and ``"val/confidence_gap"`` of a ``CalibrationMonitor`` know the side.

    Args:
        monitor: the name of a logged metric, for example ``"val/ece"``.
        target: the value that the metric should have.
        gain: how much the number moves for one unit of error.
        initial: the number before the first validation.
        low: the least number.
        high: the largest.
        rate: the most that the number moves after one validation.
        patience: how many validations in a row have to find the metric on the same side of the
            target before the number moves; 1 moves after each.

    Raises:
        RegularizationError: when training starts, if the fit has no validation; at the end of a
            validation that did not log ``monitor``.

    Note:
        Over ranks the metric is averaged and the number computed from the mean, so that all ranks
        keep the same one, bit for bit. It is saved with the technique and goes on from there.
        Cost: one reduced scalar and a host sync per validation.

    Example:
        >>> loop = ClosedLoop("val/ece", target=0.02, gain=10.0)
        >>> loop.observe(0.12)
        >>> loop.value()
        1.0
    """

    def __init__(
        self,
        monitor: str,
        target: float,
        gain: float,
        *,
        initial: float = 0.0,
        low: float = 0.0,
        high: float = float("inf"),
        rate: float = float("inf"),
        patience: int = 1,
    ) -> None:
        check_range(self, "target", target)
        check_range(self, "gain", gain)
        check_range(self, "high", high, low)
        check_range(self, "initial", initial, low, high)
        check_range(self, "rate", rate, 0, low_open=True)
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ArgumentError(
                self,
                f"`patience` must be a whole number from 1, got {patience!r}",
                cure=f'ClosedLoop("{monitor}", {target}, {gain}, patience=1)',
            )
        self.monitor = monitor
        self.target = target
        self.gain = gain
        self.initial = initial
        self.low = low
        self.high = high
        self.rate = rate
        self.patience = patience
        self._current = float(initial)
        self._side = 0
        self._seen_at = -1

    def value(self, *, step: int = 0, epoch: int = 0, progress: float = 0.0) -> float:
        """The number that the last validation led to."""
        return self._current

    def loops(self) -> list[ClosedLoop]:
        """This one."""
        return [self]

    def observe(self, metric: float) -> None:
        """Move after one validation; a metric that is not finite moves nothing."""
        if not math.isfinite(metric):
            return
        error = metric - self.target
        sign = (error > 0) - (error < 0)
        # How often in a row, positive above the target and negative below.
        self._side = sign + (self._side if sign * self._side > 0 else 0)
        if abs(self._side) < self.patience:
            return
        change = min(self.rate, max(-self.rate, self.gain * error))
        moved = min(self.high, max(self.low, self._current + change))
        # Twelve digits are more than any metric has: keeps 0.1 + 0.2 from leaving crumbs in logs.
        self._current = float(f"{moved:.12g}")

    def on_train_start(self, trainer: Any) -> None:
        """Refuse a fit in which the number could never move."""
        if not trainer.enable_validation:
            raise RegularizationError(
                self,
                f"follows {self.monitor!r} after each validation, and this fit has none",
                cure="trainer.fit(module, train_loader, val_loader)",
            )

    def on_validation_end(self, trainer: Any) -> None:
        """Read the metric from the Trainer; called by the technique that has the schedule.

        A schedule that several techniques share moves once per validation, and only in a fit.
        """
        in_fit = getattr(trainer.state.fn, "value", None) == "fit"
        if not in_fit or trainer.sanity_checking or trainer.global_step == self._seen_at:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise RegularizationError(
                self,
                f"follows the metric {self.monitor!r}, which validation did not log; it logged "
                f"{logged}",
                cure=f'self.log("{self.monitor}", value) in validation_step, or a callback that '
                "logs it: CalibrationMonitor()",
            )
        metric = torch.as_tensor(trainer.callback_metrics[self.monitor]).float()
        metric = metric.detach().to(trainer.strategy.root_device)
        self.observe(float(trainer.strategy.reduce(metric, reduce_op="mean")))
        self._seen_at = trainer.global_step

    def state_dict(self) -> dict[str, float | int]:
        """What a resume needs."""
        return {"current": self._current, "side": self._side, "seen_at": self._seen_at}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on from a saved state."""
        self._current = float(state["current"])
        self._side = int(state["side"])
        self._seen_at = int(state["seen_at"])


def _check_by(owner: Schedule, by: str) -> None:
    if by not in _BY:
        raise ArgumentError(
            owner,
            f"`by` must be one of {', '.join(_BY)}, got {by!r}",
            cure=f'{type(owner).__name__}(..., by="step")',
        )


def _position(by: By, step: int, epoch: int, progress: float) -> float:
    return {"step": step, "epoch": epoch, "progress": progress}[by]
