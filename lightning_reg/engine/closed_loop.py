"""A strength that a logged value steers."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_reg.engine.errors import ArgumentError, RegularizationError, check_range
from lightning_reg.engine.schedule import Schedule
from lightning_reg.engine.stages import fitting


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
        seen = trainer.global_step == self._seen_at
        if seen or trainer.sanity_checking or not fitting(trainer):
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


__all__ = ["ClosedLoop"]
