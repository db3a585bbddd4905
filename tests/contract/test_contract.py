"""Every technique of the catalogue keeps every promise of the contract."""

import importlib
import inspect
import pkgutil

import pytest

from lightning_reg import catalogue, techniques
from lightning_reg.engine.technique import Technique
from lightning_reg.testing import CHECKS, ContractCase, ContractError
from lightning_reg.testing.contract import KEPT, check_exemptions, not_run, run_check
from lightning_reg.testing.subject import Subject
from tests.contract import cases


def _cases() -> dict[str, ContractCase]:
    found: dict[str, ContractCase] = {}
    for info in pkgutil.iter_modules(cases.__path__, f"{cases.__name__}."):
        entries = importlib.import_module(info.name).CASES
        twice = found.keys() & entries.keys()
        assert not twice, f"{info.name} repeats the cases of {sorted(twice)}"
        found |= entries
    return found


CASES = _cases()
CLASSES = {cls.__name__: cls for cls in catalogue.techniques()}
# One subject for all checks of a class: they share runs.
SUBJECTS = {name: Subject(CLASSES[name], CASES[name]) for name in CLASSES.keys() & CASES.keys()}


def _checks(subject: Subject) -> list[str]:
    try:
        return [check for check in CHECKS if not_run(subject, check) is None]
    except ContractError:
        # An exemption that is refused has a test of its own below.
        return list(CHECKS)


PAIRS = [(name, check) for name in sorted(SUBJECTS) for check in _checks(SUBJECTS[name])]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_has_a_case_and_reasons_for_its_exemptions(name):
    assert name in CASES, (
        f"{name} has no contract case. Add one to a file in tests/contract/cases: "
        f'CASES = {{"{name}": ContractCase(...)}}'
    )
    check_exemptions(CLASSES[name])


def test_no_technique_hides_from_the_catalogue():
    found = set()
    for info in pkgutil.walk_packages(techniques.__path__, f"{techniques.__name__}."):
        module = importlib.import_module(info.name)
        found |= {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value)
            and issubclass(value, Technique)
            and value.__module__ == module.__name__
            and not name.startswith("_")
            and not inspect.isabstract(value)
        }
    assert found == CLASSES.keys()


def test_every_case_belongs_to_a_technique():
    assert sorted(CASES.keys() - CLASSES.keys()) == []


@pytest.mark.parametrize(("name", "check"), PAIRS)
def test_keeps(name, check, ranks):
    subject = SUBJECTS[name]
    subject.ranks = ranks
    assert run_check(subject, check) == KEPT
