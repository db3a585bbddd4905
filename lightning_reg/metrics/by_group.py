"""A metric for each group or domain, with the worst group and the gap between groups."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat, dim_zero_sum

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import AdditiveMetric, evaluate
from lightning_reg.metrics.kept import KeepsSamples

__all__ = ["ByGroup", "by_group"]


def by_group(
    *batch: Tensor,
    metric: AdditiveMetric,
    num_groups: int,
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """A metric of one batch by group; see :class:`ByGroup`.

    Args:
        batch: what ``metric.update`` takes, and the group of each sample last.
        metric: what to measure.
        num_groups: the number of groups.
        names: the names of the groups.

    Returns:
        The value of each group under its name, ``"worst"`` and ``"gap"``.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ExpectedAccuracy
        >>> logits, target, group = torch.eye(2), torch.tensor([0, 0]), torch.tensor([0, 1])
        >>> found = by_group(
        ...     logits, target, group, metric=ExpectedAccuracy(from_logits=True), num_groups=2
        ... )
        >>> {name: float(value) for name, value in found.items()}
        {'group_0': 1.0, 'group_1': 0.0, 'worst': 0.0, 'gap': 1.0}
    """
    found: dict[str, Tensor] = evaluate(ByGroup(metric, num_groups, names=names), *batch)
    return found


class ByGroup(KeepsSamples):
    """Any metric of this package by group or domain: each, the worst, and the gap.

    The state holds that of the metric once for each group, so that one ``update`` and one
    all-reduce serve all groups, and the values are exact over batches and ranks, of which each may
    hold any groups. ``compute`` returns a flat dictionary: the value of each group by name, NaN
    where a group has no samples; ``"worst"``, the largest value or, where higher is better, the
    smallest; ``"gap"``, the largest minus the smallest. Groups without samples take no part in
    those. A metric without a better direction has no ``"worst"``.

    Args:
        metric: what to measure, with a scalar value; it is copied, its own state does not count.
        num_groups: the number of groups, fixed.
        names: their names; ``"group_0"`` and so on by default.
        kwargs: those of ``torchmetrics.Metric``.

    Note:
        ``update`` takes what the metric's takes, and the groups last: a whole number from 0 for
        each sample (N,), or for each position (N, ...) of predictions (N, C, ...). A batch is
        sorted by group and the metric counts each part: one host sync, and an update of the metric
        for every group that the batch holds.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ByGroup, ExpectedAccuracy
        >>> metric = ByGroup(ExpectedAccuracy(from_logits=True), 2, names=["day", "night"])
        >>> metric.update(torch.eye(2), torch.tensor([0, 0]), torch.tensor([0, 1]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'day': 1.0, 'night': 0.0, 'worst': 0.0, 'gap': 1.0}
    """

    function = staticmethod(by_group)

    def __init__(
        self,
        metric: AdditiveMetric,
        num_groups: int,
        *,
        names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check(self, metric, num_groups, names)
        self.metric = copy.deepcopy(metric)
        self.metric.reset()
        self.num_groups = num_groups
        self.names = list(names) if names is not None else [f"group_{g}" for g in range(num_groups)]
        self._added, self._kept = _states(self, self.metric)
        for name in self._added:
            default = cast(Tensor, self.metric._defaults[name])
            stacked = default.new_zeros(num_groups, *default.shape)
            self.add_state(f"group_{name}", stacked, dist_reduce_fx="sum")
        for name in self._kept:
            for group in range(num_groups):
                self.add_kept(f"group_{name}_{group}")

    def update(self, *batch: Tensor) -> None:
        """Count one batch.

        Args:
            batch: what the metric's ``update`` takes, and the group of each sample last.

        Raises:
            ArgumentError: if the groups do not fit, or the metric refuses the batch.
        """
        *values, group = batch
        parts = self._split(values, group)
        counted = [self._count(part) for part in parts]
        for name in self._added:
            added = torch.stack([state[name] for state in counted])
            own = getattr(self, f"group_{name}")
            setattr(self, f"group_{name}", own + added.to(own.device))
        for name in self._kept:
            for number, state in enumerate(counted):
                own = getattr(self, f"group_{name}_{number}")
                setattr(self, f"group_{name}_{number}", [*own, *state[name]])
        self.invalid = self.invalid + sum(state["invalid"] for state in counted)

    def value(self) -> dict[str, Tensor]:
        """The value of each group, the worst, and the gap."""
        values = torch.stack([self._value_of(group) for group in range(self.num_groups)])
        if values.ndim > 1:
            raise ArgumentError(
                self,
                f"needs a metric with a scalar value, got {tuple(values.shape[1:])}",
                cure="ByGroup(CalibrationError(from_logits=True), num_groups=3)",
            )
        found = dict(zip(self.names, values, strict=True))
        low, high = _extreme(values, largest=False), _extreme(values, largest=True)
        if self.metric.higher_is_better is not None:
            found["worst"] = low if self.metric.higher_is_better else high
        return {**found, "gap": high - low}

    def update_settings(self) -> tuple[Any, ...]:
        """What decides how a batch is counted: the metric's own settings, and the groups."""
        return ("ByGroup", self.num_groups, self.metric.update_settings())

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """The value of each group as a bar, drawn from the state.

        Args:
            val: a result of ``compute`` to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.order_figures import draw_groups

        found = self.value() if val is None else val
        values = [float(found[name]) for name in self.names]
        return draw_groups(self.names, values, label=type(self.metric).__name__, ax=ax)

    def _split(self, values: list[Tensor], group: Tensor) -> list[list[Tensor]]:
        self._check_groups(group)
        if group.ndim != 1 or any(v.shape[:1] != group.shape for v in values):
            values, group = [self._as_rows(v, group) for v in values], group.reshape(-1)
        order = torch.argsort(group, stable=True)
        sizes = torch.bincount(group, minlength=self.num_groups).tolist()
        parts = [v.index_select(0, order.to(v.device)).split(sizes) for v in values]
        return [list(part) for part in zip(*parts, strict=True)]

    def _as_rows(self, value: Tensor, group: Tensor) -> Tensor:
        if value.shape == group.shape:
            return value.reshape(-1)
        if value.ndim == group.ndim + 1 and value.shape[:1] + value.shape[2:] == group.shape:
            return value.movedim(1, -1).reshape(-1, value.shape[1])
        raise ArgumentError(
            self,
            f"groups of shape {tuple(group.shape)} do not fit a tensor of shape "
            f"{tuple(value.shape)}",
            cure="metric.update(logits, target, group), with a group for each sample",
        )

    def _check_groups(self, group: Tensor) -> None:
        if group.is_floating_point() or group.dtype == torch.bool:
            found = f"{group.dtype}"
        elif group.numel() and not 0 <= int(group.min()) <= int(group.max()) < self.num_groups:
            found = f"{int(group.min())} to {int(group.max())}"
        else:
            return
        raise ArgumentError(
            self,
            f"groups are whole numbers from 0 to {self.num_groups - 1}, got {found}",
            cure="metric.update(logits, target, group)",
        )

    def _count(self, part: list[Tensor]) -> dict[str, Any]:
        self.metric.reset()
        if len(part[0]):
            self.metric.update(*part)
        # ``reset`` empties lists in place.
        found = self.metric.metric_state
        return {**found, **{name: _as_list(found[name]) for name in self._kept}}

    def _value_of(self, group: int) -> Tensor:
        self.metric.reset()
        for name in self._added:
            setattr(self.metric, name, getattr(self, f"group_{name}")[group])
        for name in self._kept:
            setattr(self.metric, name, _as_list(getattr(self, f"group_{name}_{group}")))
        value: Tensor = self.metric.value()
        self.metric.reset()
        return value


def _states(owner: object, metric: AdditiveMetric) -> tuple[list[str], list[str]]:
    """The names of the states that add up, and of those that keep samples."""
    added = [n for n, r in metric._reductions.items() if r is dim_zero_sum]
    kept = [n for n, r in metric._reductions.items() if r is dim_zero_cat]
    others = metric._reductions.keys() - {*added, *kept, "settings_key"}
    if others:
        raise ArgumentError(
            owner,
            f"the states {sorted(others)} of {type(metric).__name__} do not add up",
            cure="ByGroup(CalibrationError(from_logits=True), num_groups=3)",
        )
    return added, kept


def _as_list(kept: list[Tensor] | Tensor) -> list[Tensor]:
    """A list of its own; what was joined over ranks is a single tensor."""
    return [kept] if isinstance(kept, Tensor) else list(kept)


def _extreme(values: Tensor, largest: bool) -> Tensor:
    known = ~torch.isnan(values)
    if largest:
        found = torch.where(known, values, float("-inf")).max()
    else:
        found = torch.where(known, values, float("inf")).min()
    return torch.where(known.any(), found, float("nan"))


def _check(owner: object, metric: object, num_groups: int, names: Sequence[str] | None) -> None:
    cure = "ByGroup(CalibrationError(from_logits=True), num_groups=3)"
    if not isinstance(metric, AdditiveMetric):
        raise ArgumentError(
            owner, f"needs a metric of this package, got {type(metric).__name__}", cure=cure
        )
    if not isinstance(num_groups, int) or isinstance(num_groups, bool) or num_groups < 1:
        raise ArgumentError(
            owner, f"`num_groups` must be a whole number from 1, got {num_groups!r}", cure=cure
        )
    if names is None:
        return
    if len(names) != num_groups or len({*names, "worst", "gap"}) != num_groups + 2:
        raise ArgumentError(
            owner,
            f"needs {num_groups} different names other than worst and gap, got {list(names)}",
            cure='names=["day", "night"]',
        )
