"""Every technique has its place in the benchmark of step times."""

import importlib
import sys
from pathlib import Path

import pytest

import lightning_reg as reg
from lightning_reg import catalogue

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
OWN = ("models", "techniques", "timing")


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("techniques")
    finally:
        sys.path.remove(str(FOLDER))
        for name in OWN:
            sys.modules.pop(name, None)


def test_every_technique_can_be_made_or_has_a_reason_not_to_be_measured(bench):
    for name in bench.measured():
        make = bench.SETTINGS.get(name, lambda _, name=name: getattr(reg, name)())
        assert type(make("resnet")).__name__ == name
    assert set(bench.OTHER_TASKS.values()) <= set(bench.TASKS)


def test_no_entry_outlives_its_technique(bench):
    names = {cls.__name__ for cls in catalogue.callbacks()}
    for table in (bench.SETTINGS, bench.OTHER_TASKS, bench.ONLY, bench.NOT_HERE):
        assert set(table) <= names
    assert not set(bench.NOT_HERE) & (set(bench.SETTINGS) | set(bench.OTHER_TASKS))


def test_a_technique_is_measured_beside_the_plain_step(bench):
    found = bench.measure({"plain": list, "ours": lambda: [reg.SAM()]}, steps=3, rounds=2)
    assert {name: len(rounds) for name, rounds in found.items()} == {"plain": 2, "ours": 2}
    assert bench.ratios(found, "plain")["plain"] == (1.0, 0.0)
