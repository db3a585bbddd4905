"""The shape of the package: what imports what, what is public, what an import costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_reg
from lightning_reg import _stubs, catalogue, functional
from lightning_reg.engine import ArgumentError, Regularizer
from lightning_reg.testing import CHECKS

ROOT = Path(lightning_reg.__file__).parent
ALLOWED = {
    "engine": {"engine"},
    "metrics": {"metrics", "engine"},
    "mechanisms": {"mechanisms", "engine"},
    "techniques": {"mechanisms", "engine"},
    "calibrators": {"calibrators", "metrics", "engine"},
    "monitors": {"monitors", "calibrators", "metrics", "engine"},
    "strategies": {"strategies", "engine"},
}


def imported_parts(file: Path) -> set[str]:
    """The parts of the package that a file imports, when loaded or later."""
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_reg."):
            parts.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            parts |= {a.name.split(".")[1] for a in node.names if a.name[:14] == "lightning_reg."}
    return parts


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    for file in (ROOT / part).rglob("*.py"):
        assert imported_parts(file) <= ALLOWED[part], file.name


def test_no_technique_imports_another():
    for file in (ROOT / "techniques").rglob("*.py"):
        assert "techniques" not in imported_parts(file), file.name


def test_stubs_are_current():
    command = "run `python -m lightning_reg._stubs`"
    assert (ROOT / "__init__.pyi").read_text() == _stubs.top_level(), command
    assert (ROOT / "functional.pyi").read_text() == _stubs.functional(), command


def test_every_public_name_can_be_imported():
    assert len(lightning_reg.__all__) == len(set(lightning_reg.__all__))
    for module in (lightning_reg, functional):
        for name in module.__all__:
            assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="NoSuchTechnique"):
        lightning_reg.NoSuchTechnique  # noqa: B018


def test_every_technique_is_public_under_its_own_name_and_has_a_card():
    for cls in catalogue.techniques():
        assert getattr(lightning_reg, cls.__name__) is cls
        assert cls.papers, f"{cls.__name__} names no paper"
        card = cls.__doc__ or ""
        takes_arguments = issubclass(cls, Regularizer)
        for part in ("Args:", "Note:", "Example:") if takes_arguments else ("Note:", "Example:"):
            assert part in card, f"the card of {cls.__name__} has no {part}"
        if cls.function is not None:
            assert getattr(functional, cls.function.__name__) is cls.function


def test_exemptions_name_checks_and_give_reasons():
    for cls in catalogue.techniques():
        for check, reason in cls.exemptions.items():
            assert check in CHECKS, f"{cls.__name__}: {check}"
            assert len(reason) > 15, f"{cls.__name__}: {check}"


def test_names_in_logs_and_checkpoints_are_unique():
    names = [cls.__name__.lower() for cls in catalogue.techniques()]
    assert len(set(names)) == len(names)


def test_a_name_is_found_in_any_case_and_a_wrong_one_names_the_nearest():
    assert catalogue.find("sam") is lightning_reg.SAM
    with pytest.raises(ArgumentError, match="VonNeumannEntropy"):
        catalogue.find("VonNeumanEntropie")


def test_families_and_mechanisms_follow_from_where_classes_live():
    entry = next(e for e in catalogue.entries() if e.name == "SAM")
    assert (entry.family, entry.mechanism) == ("sharpness", "NormalizedAscent")
    assert "callback" in entry.kinds
    json.dumps([e.as_dict() for e in catalogue.entries()])
    assert all(issubclass(c, Regularizer) for c in catalogue.callbacks())


def test_importing_the_package_is_light():
    code = """
import sys
import lightning.pytorch
before = set(sys.modules)
import lightning_reg
new = {m.partition(".")[0] for m in set(sys.modules) - before}
import torch.distributed
assert not torch.distributed.is_initialized()
assert "lightning_reg.techniques" not in sys.modules
print(sorted(new - set(sys.stdlib_module_names)))
"""
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['lightning_reg']"
