"""What all metrics share: exact states, one collective on the right device, no mix-ups."""

import pytest
import torch
import torch.distributed as dist
from torchmetrics import MetricCollection

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import CalibrationError, ExpectedAccuracy, NegativeLogLikelihood
from lightning_reg.metrics.additive import AdditiveMetric
from lightning_reg.testing import ContractError, MetricCase, check_metric

LOGITS = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))


def filled(metric):
    metric.update(LOGITS, TARGETS)
    return metric


class Sum(AdditiveMetric):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_count("count")
        self.add_total("total")

    def update(self, values):
        self.count = self.count + len(values)
        self.total = self.total + values.sum()

    def value(self):
        return self.total / self.count


class Elsewhere:
    """A collective that reaches one kind of device only and adds what another rank has."""

    def __init__(self, backend, device):
        self.backend, self.device, self.seen = backend, torch.device(device), []

    def install(self, monkeypatch):
        monkeypatch.setattr(dist, "get_backend", lambda group=None: self.backend)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def all_reduce(self, tensor, group=None):
        self.seen.append((tensor.device.type, tensor.dtype))
        tensor.mul_(2)


@pytest.mark.parametrize(("backend", "device"), [("nccl", "cuda"), ("gloo", "cpu")])
def test_the_collective_runs_where_its_backend_can(monkeypatch, backend, device):
    fake = Elsewhere(backend, device)
    fake.install(monkeypatch)
    moved = []
    # There is no GPU here: what would go there is noted and stays.
    original = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        if args and isinstance(args[0], torch.device) and args[0].type == "cuda":
            moved.append(args[0])
            return original(tensor, "cpu", copy=True)
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    metric = filled(CalibrationError(from_logits=True, distributed_available_fn=lambda: True))
    with metric.sync_context():
        assert int(metric.counts.sum()) == 80
        assert metric.counts.dtype == torch.int64
    assert moved == ([torch.device("cuda", 0)] if device == "cuda" else [])
    assert fake.seen == [("cpu", torch.float64)]
    assert int(metric.counts.sum()) == 40


def test_counts_beyond_float32_are_exact_over_ranks():
    metric = Sum(distributed_available_fn=lambda: True, dist_sync_fn=lambda t, group=None: [t, t])
    metric.update(torch.ones(1))
    metric.count = metric.count + 2**40
    with metric.sync_context(metric.dist_sync_fn):
        assert int(metric.count) == 2 * (2**40 + 1)


def test_metrics_that_are_still_at_zero_do_not_share_their_update():
    kinds = {
        "nll": NegativeLogLikelihood(from_logits=True),
        "accuracy": ExpectedAccuracy(from_logits=True),
        "logits": CalibrationError(from_logits=True),
        "seven": CalibrationError(from_logits=True, ignore_index=-100),
    }
    together = MetricCollection(kinds)
    together.update(torch.zeros(0, 3), torch.zeros(0).long())
    together.update(LOGITS, TARGETS)
    alone = {
        "nll": filled(NegativeLogLikelihood(from_logits=True)).compute(),
        "accuracy": filled(ExpectedAccuracy(from_logits=True)).compute(),
    }
    values = together.compute()
    for name, value in alone.items():
        assert float(values[name]) == float(value)


@pytest.mark.parametrize(
    "other",
    [CalibrationError(from_logits=True, n_bins=7), CalibrationError(from_logits=False)],
)
def test_a_state_of_other_settings_is_neither_merged_nor_loaded(other):
    metric, source = CalibrationError(from_logits=True), other
    source.update(LOGITS.softmax(1), TARGETS)
    with pytest.raises(ArgumentError, match="same settings"):
        metric.merge_state(source)
    for m in (metric, source):
        m.persistent(True)
    with pytest.raises(ArgumentError, match="same settings"):
        metric.load_state_dict(source.state_dict())
    assert int(metric.counts.sum()) == 0


def test_a_batch_that_is_refused_halfway_counts_nothing():
    metric = filled(NegativeLogLikelihood(from_logits=True))
    before, metric.block_size = metric.metric_state, 30
    wrong = torch.where(torch.arange(40) == 39, 3, TARGETS)
    for call in (metric.update, metric):
        with pytest.raises(ArgumentError, match="outside their range"):
            call(LOGITS, wrong)
        assert all(torch.equal(before[name], s) for name, s in metric.metric_state.items())
        assert metric.update_count == 1


def test_half_leaves_counts_and_sums_exact():
    metric = filled(CalibrationError(from_logits=True)).half()
    metric.set_dtype(torch.float16)
    assert (metric.counts.dtype, metric.confidence_sum.dtype) == (torch.int64, torch.float64)


def test_a_loaded_state_is_the_metrics_own():
    source, target = filled(Sum2()), Sum2()
    for metric in (source, target):
        metric.persistent(True)
    state = source.state_dict()
    target.load_state_dict(state)
    state["count"].add_(1)
    assert int(target.count) == 40


class Sum2(Sum):
    def update(self, values, _=None):
        super().update(values)


class KeepsTheSamples(Sum):
    def update(self, values):
        super().update(values)
        self.total = torch.cat([self.total.reshape(-1), values])

    def value(self):
        return self.total.sum() / self.count


class Averages(Sum):
    def update(self, values):
        self.count = self.count + 1
        self.total = self.total + values.mean()


class KeepsTheGraph(Sum):
    def value(self):
        return self.last.mean()

    def update(self, values):
        super().update(values)
        self.last = values


class ByBatches(Sum):
    def update(self, values):
        super().update(values)
        self.count = self.count + 1


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (KeepsTheSamples, "constant"),
        (Averages, "batches"),
        (KeepsTheGraph, "graph"),
        (KeepsTheGraph, "reuse"),
        (ByBatches, "batches"),
        (Sum, "function"),
        (Sum, "invalid"),
    ],
)
def test_the_contract_finds_who_breaks_it(cls, check):
    case = MetricCase(args={}, data=(torch.arange(40.0),))
    with pytest.raises(ContractError, match=check):
        check_metric(cls, case, [check])


def test_the_contract_is_kept_by_a_plain_sum():
    case = MetricCase(args={}, data=(torch.arange(40.0).double(),))
    checks = ("batches", "order", "reuse", "graph", "constant", "half", "empty", "ranks", "merge")
    assert set(check_metric(Sum, case, checks).values()) == {"kept"}
