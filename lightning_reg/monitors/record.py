"""What a monitor remembers: values, their history, and the states that figures are drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_reg.metrics.additive import AdditiveMetric, join_states

Metrics = Mapping[str, AdditiveMetric]
Entry = dict[str, float]


class Record:
    """The memory of a monitor; goes into its checkpoint as tensors and primitives.

    Attributes:
        results: the latest value of each log key.
        history: by tag (``"val"``), one entry for each validation of a fit: ``epoch``, ``step`` and
            the values by name.
        states: by tag, the joined states of the metrics as they were last read.
        steps: by tag, the optimizer steps that had been done then.
    """

    def __init__(self) -> None:
        self.results: dict[str, float] = {}
        self.history: dict[str, list[Entry]] = {}
        self.states: dict[str, dict[str, dict[str, Tensor]]] = {}
        self.steps: dict[str, int] = {}

    def keep(self, tag: str, states: dict[str, dict[str, Tensor]], step: int) -> None:
        """Remember what metrics hold, in place of what they held before."""
        self.states[tag], self.steps[tag] = states, step

    def title(self, tag: str) -> str:
        """What a figure of the states shows."""
        return f"{tag}, step {self.steps[tag]}"

    def remember(self, tag: str, entry: Entry) -> None:
        """Add to the history; a validation that is run again at a step replaces the first."""
        kept = self.history.setdefault(tag, [])
        if kept and kept[-1]["step"] == entry["step"]:
            kept.pop()
        kept.append(entry)

    def curve(self, tag: str, name: str) -> tuple[list[float], list[float]]:
        """Epochs, and the values of one name at them."""
        entries = [entry for entry in self.history.get(tag, []) if name in entry]
        return [entry["epoch"] for entry in entries], [entry[name] for entry in entries]

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "results": dict(self.results),
            "history": {tag: [dict(e) for e in entries] for tag, entries in self.history.items()},
            "states": {tag: dict(states) for tag, states in self.states.items()},
            "steps": dict(self.steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self.results = dict(state["results"])
        self.history = {
            tag: [dict(e) for e in entries] for tag, entries in state["history"].items()
        }
        self.states = {tag: dict(states) for tag, states in state["states"].items()}
        self.steps = dict(state["steps"])


@contextmanager
def joined(metrics: Metrics) -> Iterator[None]:
    """Within it, the metrics' states are those of all ranks."""
    join_states(metrics.values())
    try:
        yield
    finally:
        for metric in metrics.values():
            metric.unsync(should_unsync=metric._is_synced)


def update_all(metrics: Iterable[AdditiveMetric], *batch: Tensor) -> None:
    """Count a batch; metrics that count alike share one update."""
    for group in _alike(metrics):
        first, *others = group
        first.update(*batch)
        for metric in others:
            _share(metric, first.metric_state)


def states_of(metrics: Metrics) -> dict[str, dict[str, Tensor]]:
    """Copies on the CPU; of metrics that count alike and counted the same, the first one's."""
    names = {id(metric): name for name, metric in metrics.items()}
    kept: dict[str, dict[str, Tensor]] = {}
    for first, *others in _alike(metrics.values()):
        kept[names[id(first)]] = _copies(first)
        for metric in others:
            own = _copies(metric)
            if any(not torch.equal(own[name], v) for name, v in kept[names[id(first)]].items()):
                kept[names[id(metric)]] = own
    return kept


def with_states(metrics: Metrics, states: Mapping[str, Mapping[str, Tensor]]) -> Metrics:
    """The metrics, once they hold the states that :func:`states_of` took."""
    names = {id(metric): name for name, metric in metrics.items()}
    for group in _alike(metrics.values()):
        first = states.get(names[id(group[0])])
        for metric in group:
            found = states.get(names[id(metric)], first)
            if found is not None:
                _share(metric, found)
    return metrics


def _alike(metrics: Iterable[AdditiveMetric]) -> list[list[AdditiveMetric]]:
    groups: dict[Any, list[AdditiveMetric]] = {}
    for metric in metrics:
        groups.setdefault(metric.update_settings(), []).append(metric)
    return list(groups.values())


def _share(metric: AdditiveMetric, states: Mapping[str, Any]) -> None:
    # By reference: a metric adds a batch out of place.
    for name, state in states.items():
        setattr(metric, name, state)
    metric._update_count = max(metric._update_count, 1)
    metric._computed = None


def _copies(metric: AdditiveMetric) -> dict[str, Tensor]:
    return {name: _on_cpu(state) for name, state in metric.metric_state.items()}


def _on_cpu(state: Any) -> Tensor:
    if isinstance(state, list):
        return torch.cat(state).detach().cpu() if state else torch.zeros(0, dtype=torch.float64)
    copy: Tensor = state.detach().cpu().clone()
    return copy
