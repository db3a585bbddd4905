"""The promises that metrics keep, each as a check."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.testing.errors import ContractError
from lightning_reg.testing.metric_case import MetricCase


class MetricSubject:
    """A metric class and its case, with what the checks share."""

    def __init__(self, cls: type[Metric], case: MetricCase) -> None:
        self.cls = cls
        self.case = case
        self.whole = self.filled([case.data])
        self.expected = _computed(self.whole)

    def fresh(self) -> Metric:
        return self.cls(**self.case.args)

    def filled(self, batches: Iterable[tuple[Any, ...]]) -> Metric:
        metric = self.fresh()
        for batch in batches:
            metric.update(*batch)
        return metric

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise ContractError(self.cls.__name__, problem)

    def require_same_state(self, metric: Metric, of: Metric, what: str) -> None:
        for name, wanted in of.metric_state.items():
            found = _joined_list(getattr(metric, name))
            for f, w in zip(tree_leaves(found), tree_leaves(_joined_list(wanted)), strict=True):
                same = torch.equal(f, w) if not w.is_floating_point() else _close(f, w, 1e-12)
                self.require(same, f"{what}: the state `{name}` is {f} and not {w}")

    def require_value(self, found: Any, what: str, expected: Any = None) -> None:
        expected = self.expected if expected is None else expected
        ours, theirs = tree_leaves(found), tree_leaves(expected)
        self.require(len(ours) == len(theirs), f"{what}: {found} is no value like {expected}")
        for f, w in zip(ours, theirs, strict=True):
            same = _close(torch.as_tensor(f), torch.as_tensor(w), self.case.tolerance)
            self.require(same, f"{what}: the value is {f} and not {w}")


def _batches(s: MetricSubject) -> None:
    """Any split into batches has the same counts, and sums up to rounding."""
    n = s.case.size
    for sizes in ([1] * n, [n - 1, 0, 1], [n // 3, n - n // 3]):
        metric = s.filled(s.case.split(sizes))
        s.require_same_state(metric, s.whole, f"batches of {sizes[:3]}")
        s.require_value(_computed(metric), f"batches of {sizes[:3]}")


def _order(s: MetricSubject) -> None:
    """The order of the samples makes no difference."""
    shuffled = torch.randperm(s.case.size, generator=torch.Generator().manual_seed(0))
    data = tuple(t.index_select(s.case.dim(i), shuffled) for i, t in enumerate(s.case.data))
    s.require_value(_computed(s.filled([data])), "in another order")


def _reuse(s: MetricSubject) -> None:
    """A caller that reuses its tensors changes nothing, and the metric does not write to them."""
    data = s.case.part(0, s.case.size)
    metric = s.filled([data])
    untouched = all(torch.equal(t, o) for t, o in zip(data, s.case.data, strict=True))
    s.require(untouched, "update wrote into what it was given")
    for tensor in data:
        tensor.zero_()
    s.require_value(_computed(metric), "after the caller's tensors were overwritten")


def _graph(s: MetricSubject) -> None:
    """No autograd graph is kept, neither in the state nor in the value."""
    data = [t.clone().requires_grad_(t.is_floating_point()) for t in s.case.data]
    metric = s.fresh()
    value = metric(*data)
    metric.update(*data)
    for tensor in tree_leaves([metric.metric_state, value, metric.compute()]):
        kept = isinstance(tensor, Tensor) and tensor.requires_grad
        s.require(not kept, "a tensor of the state or the value requires grad")


def _constant(s: MetricSubject) -> None:
    """The state does not grow with the number of samples."""
    few, many = s.filled([s.case.part(0, 4)]), s.filled([s.case.data] * 3)
    s.require(_size(few) == _size(many), f"the state grew from {_size(few)} to {_size(many)}")


def _half(s: MetricSubject) -> None:
    """Half precision input is read in high precision: no NaN, no underflow."""
    for dtype in (torch.float16, torch.bfloat16):
        halves = [t.to(dtype) if i in s.case.half else t for i, t in enumerate(s.case.data)]
        floats = [t.float() if i in s.case.half else t for i, t in enumerate(halves)]
        exact = s.fresh()
        if hasattr(exact, "validate_args"):
            # Probabilities that were rounded do not sum to one in float32's tolerance.
            exact.validate_args = False
        exact.update(*floats)
        for f, w in zip(
            tree_leaves(_computed(s.filled([tuple(halves)]))),
            tree_leaves(_computed(exact)),
            strict=True,
        ):
            same = _close(torch.as_tensor(f), torch.as_tensor(w), max(s.case.tolerance, 1e-5))
            s.require(same, f"the value in {dtype} is {f}, of the same numbers in float32 {w}")


def _invalid(s: MetricSubject) -> None:
    """A sample with NaN or infinity is reported and not counted."""
    dim, position = s.case.dim(s.case.invalid), s.case.invalid
    data = [t.clone() for t in s.case.data]
    for row, value in ((1, float("nan")), (3, float("inf"))):
        sample = data[position].select(dim, row)
        sample[(0,) * sample.ndim] = value
    metric = s.filled([tuple(data)])
    reported = int(metric.metric_state.get("invalid", torch.zeros(())))  # type: ignore[arg-type]
    s.require(reported == 2, f"of 2 invalid samples {reported} are reported")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = metric.compute()
    said = any("2 predictions held NaN or infinity" in str(w.message) for w in caught)
    s.require(said, "compute does not say how many samples were left out")
    kept = torch.tensor([i for i in range(s.case.size) if i not in (1, 3)])
    rest = tuple(t.index_select(s.case.dim(i), kept) for i, t in enumerate(s.case.data))
    s.require_value(value, "with invalid samples", _computed(s.filled([rest])))


def _empty(s: MetricSubject) -> None:
    """Nothing counted is NaN, and an empty batch changes nothing."""
    metric = s.filled([s.case.part(0, 0), s.case.data, s.case.part(0, 0)])
    s.require_value(_computed(metric), "with empty batches")
    before, empty = _computed(s.fresh()), _computed(s.filled([s.case.part(0, 0)]))
    s.require_value(empty, "after an empty batch", before)
    for leaf in tree_leaves(before) if s.case.empty_is_nan else []:
        nan = not torch.as_tensor(leaf).is_floating_point() or bool(torch.isnan(leaf).all())
        s.require(nan, f"before anything was counted the value is {leaf} and not NaN")


def _reset(s: MetricSubject) -> None:
    """A reset metric starts from nothing."""
    metric = s.filled([s.case.data])
    metric.compute()
    metric.reset()
    s.require_same_state(metric, s.fresh(), "after reset")
    metric.update(*s.case.data)
    s.require_value(_computed(metric), "counted again after reset")


def _forward(s: MetricSubject) -> None:
    """``forward`` gives the batch's value and counts the batch once."""
    first, second = s.case.split([s.case.size // 2, s.case.size - s.case.size // 2])
    metric = s.fresh()
    for batch in (first, second):
        s.require_value(metric(*batch), "forward", _computed(s.filled([batch])))
    s.require_value(_computed(metric), "after forward")


def _copies(s: MetricSubject) -> None:
    """Copies by deepcopy and pickle carry the state and are independent."""
    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        other = duplicate(s.whole)
        s.require_value(_computed(other), "of a copy")
        other.update(*s.case.data)
        s.require_same_state(s.whole, s.filled([s.case.data]), "the original of a copy")


def _checkpoint(s: MetricSubject) -> None:
    """A checkpoint carries the state, by ``weights_only`` too, and counting goes on."""
    first, second = s.case.split([s.case.size // 2, s.case.size - s.case.size // 2])
    source, resumed, buffer = s.filled([first]), s.fresh(), io.BytesIO()
    source.persistent(True)
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    resumed.persistent(True)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    resumed.update(*second)
    s.require_same_state(resumed, s.whole, "resumed from a checkpoint")
    s.require_value(_computed(resumed), "resumed from a checkpoint")


def _merge(s: MetricSubject) -> None:
    """Metrics of parts merge into that of the whole, after ``compute`` too."""
    first, second = s.case.split([s.case.size // 4, s.case.size - s.case.size // 4])
    metric = s.filled([first])
    metric.compute()
    metric.merge_state(s.filled([second]))
    s.require_same_state(metric, s.whole, "merged")
    s.require_value(metric.compute(), "merged")


def _inference(s: MetricSubject) -> None:
    """Counting works in inference mode, and goes on outside."""
    first, second = s.case.split([s.case.size // 2, s.case.size - s.case.size // 2])
    metric = s.fresh()
    with torch.inference_mode():
        metric.reset()
        metric.update(*first)
        metric.compute()
    metric.update(*second)
    s.require_value(_computed(metric), "begun in inference mode")


def _ranks(s: MetricSubject) -> None:
    """Three ranks with unequal and empty shards equal one process."""
    n = s.case.size
    for sizes in ([n // 2, n - n // 2 - 1, 1], [n, 0, 0], [n // 4, 0, n - n // 4]):
        for value, state in simulate_ranks([s.filled([p]) for p in s.case.split(sizes)])[0]:
            what = f"over ranks of {sizes} samples"
            for name, wanted in s.whole.metric_state.items():
                if isinstance(wanted, Tensor) and not wanted.is_floating_point():
                    same = torch.equal(state[name], wanted) or name == "settings_key"
                    s.require(same, f"{what}: the count `{name}` is {state[name]}")
            s.require_value(value, what)


def _collectives(s: MetricSubject) -> None:
    """One collective, whose size does not depend on the number of samples."""
    seen = []
    for data in (s.case.part(0, 4), s.case.data):
        _, sent = simulate_ranks([s.filled([data]) for _ in range(2)])
        seen.append([t.numel() for t in sent[0]])
    s.require(len(seen[1]) == 1, f"there are {len(seen[1])} collectives and not one")
    s.require(seen[0] == seen[1], f"what is sent grows from {seen[0]} to {seen[1]} numbers")


def _function(s: MetricSubject) -> None:
    """The functional twin gives the same value."""
    function = getattr(s.cls, "function", None)
    s.require(function is not None, "there is no functional twin (the class attribute `function`)")
    args = s.case.args if s.case.function_args is None else s.case.function_args
    assert function is not None
    s.require_value(function(*s.case.data, **args), "of the function")


def _refused(s: MetricSubject) -> None:
    """A batch that is refused leaves the state as it was."""
    for bad in s.case.bad:
        metric = s.filled([s.case.data])
        calls: tuple[Callable[..., Any], ...] = (metric.update, metric)
        for call in calls:
            try:
                call(*bad)
            except ArgumentError:
                continue
            s.require(False, f"{[getattr(b, 'shape', b) for b in bad]} was not refused")
        s.require_same_state(metric, s.whole, "after a batch that was refused")
        s.require_value(_computed(metric), "after a batch that was refused")


METRIC_CHECKS: dict[str, Callable[[MetricSubject], None]] = {
    f.__name__[1:]: f
    for f in (
        _batches,
        _order,
        _reuse,
        _graph,
        _constant,
        _half,
        _invalid,
        _empty,
        _reset,
        _forward,
        _copies,
        _checkpoint,
        _merge,
        _inference,
        _ranks,
        _collectives,
        _function,
        _refused,
    )
}


def simulate_ranks(
    metrics: Sequence[Metric],
) -> tuple[list[tuple[Any, dict[str, Any]]], list[list[Tensor]]]:
    """What metrics of several ranks give together, without processes.

    The first run records what each rank sends; the second one answers with what all have sent.

    Returns:
        For each rank its value and its joined state; and for each rank what it sent.
    """
    sent: list[list[Tensor]] = []
    for metric in metrics:
        own: list[Tensor] = []
        _join(metric, lambda t, group=None, own=own: own.append(t.clone()) or [t, t])
        sent.append(own)
    results = []
    for metric in metrics:
        rounds = iter(zip(*sent, strict=True))
        results.append(_join(metric, lambda t, group=None, rounds=rounds: list(next(rounds))))
    return results, sent


def _join(metric: Metric, gather: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    metric = copy.deepcopy(metric)
    metric.dist_sync_fn, metric.distributed_available_fn = gather, lambda: True
    metric.sync(dist_sync_fn=gather)
    joined = dict(metric.metric_state)
    metric._to_sync = False
    return _computed(metric), joined


def _computed(metric: Metric) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric.compute()


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if found.shape != wanted.shape:
        return False
    pair = (found.detach().double().cpu(), wanted.detach().double().cpu())
    return torch.allclose(*pair, rtol=tolerance, atol=tolerance, equal_nan=True)


def _joined_list(state: Any) -> Any:
    """A state that keeps samples, whatever the batches and the order that they came in."""
    kept = isinstance(state, list) and len(state) > 0
    return torch.cat(state).sort(0).values if kept else state


def _size(metric: Metric) -> int:
    return sum(
        t.numel() * t.element_size() for t in tree_leaves(list(metric.metric_state.values()))
    )
