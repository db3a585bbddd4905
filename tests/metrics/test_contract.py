"""Every metric of the catalogue keeps every promise of the contract."""

import contextlib
import copy
import importlib
import inspect
import pkgutil
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lightning_reg import catalogue, metrics
from lightning_reg.metrics.additive import AdditiveMetric
from lightning_reg.testing import METRIC_CHECKS, MetricCase, check_metric
from tests.metrics import cases


def _cases() -> dict[str, list[MetricCase]]:
    found: dict[str, list[MetricCase]] = {}
    for info in pkgutil.iter_modules(cases.__path__, f"{cases.__name__}."):
        entries = importlib.import_module(info.name).CASES
        twice = found.keys() & entries.keys()
        assert not twice, f"{info.name} repeats the cases of {sorted(twice)}"
        found |= {n: list(c) if isinstance(c, (list, tuple)) else [c] for n, c in entries.items()}
    return found


CASES = _cases()
# Fed with losses to be differentiated, not with samples; tests/metrics/test_hessian.py.
OF_LOSSES = {"HessianTopEigenvalue", "HessianTrace"}
# What metrics are made of: named, so that no metric passes for a base.
BASES = {
    "BinnedMetric",
    "DenseMean",
    "GaussianMean",
    "MeanMetric",
    "OrderMetric",
    "SelectiveMetric",
}
CLASSES = {cls.__name__: cls for cls in catalogue.metrics() if cls.__name__ not in OF_LOSSES}
PAIRS = [
    pytest.param(CLASSES[name], case, id=f"{name}-{number}")
    for name in sorted(CASES.keys() & CLASSES.keys())
    for number, case in enumerate(CASES[name])
]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_has_a_case_and_reasons_for_its_exemptions(name):
    assert CASES.get(name), (
        f"{name} has no case. Add one to a file in tests/metrics/cases: "
        f'CASES = {{"{name}": MetricCase(args=..., data=...)}}'
    )
    for case in CASES[name]:
        for check, reason in case.exemptions.items():
            assert check in METRIC_CHECKS
            assert len(reason.split()) > 3


def test_every_case_belongs_to_a_metric():
    assert sorted(CASES.keys() - CLASSES.keys()) == []


def test_no_metric_hides_from_the_catalogue():
    found = set()
    for info in pkgutil.walk_packages(metrics.__path__, f"{metrics.__name__}."):
        module = importlib.import_module(info.name)
        found |= {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value)
            and issubclass(value, AdditiveMetric)
            and value.__module__ == module.__name__
            and getattr(value, "value", None) is not AdditiveMetric.value
            and not name.startswith("_")
            and not inspect.isabstract(value)
        }
    assert found - BASES <= CLASSES.keys()
    assert found >= BASES


def test_every_metric_is_additive_and_has_a_card():
    for cls in CLASSES.values():
        assert issubclass(cls, AdditiveMetric)
        assert "Example:" in (cls.__doc__ or "")


@pytest.mark.parametrize(("cls", "case"), PAIRS)
def test_keeps(cls, case):
    check_metric(cls, case)


COLLECTIVES = ("all_gather", "all_reduce", "barrier", "broadcast", "all_gather_object")


def _recorded(name, calls):
    original = getattr(torch.distributed, name)

    def call(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    return mock.patch.object(torch.distributed, name, call)


def count_on_rank(cls, case, shards):
    """The value over all ranks, this rank's own counts after it, and the collectives it took."""
    metric = cls(**case.args)
    metric.update(*shards[torch.distributed.get_rank()])
    own = copy.deepcopy(metric.metric_state)
    calls = []
    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(_recorded(name, calls))
        value = metric.compute()
    kept = zip(tree_leaves(own), tree_leaves(metric.metric_state), strict=True)
    restored = all(torch.equal(before, after) for before, after in kept)
    return tree_leaves(value), restored, calls


@pytest.mark.parametrize(("cls", "case"), PAIRS)
def test_two_ranks_equal_one_process(ranks, cls, case):
    if "ranks" in case.exemptions:
        return
    whole = cls(**case.args)
    whole.update(*case.data)
    for sizes in ([case.size // 3, case.size - case.size // 3], [case.size, 0]):
        for value, restored, calls in ranks.run(count_on_rank, cls, case, case.split(sizes)):
            assert restored
            assert calls == ["all_reduce"] or "collectives" in case.exemptions
            for found, wanted in zip(value, tree_leaves(whole.compute()), strict=True):
                torch.testing.assert_close(
                    torch.as_tensor(found),
                    torch.as_tensor(wanted),
                    rtol=case.tolerance,
                    atol=case.tolerance,
                    equal_nan=True,
                )
