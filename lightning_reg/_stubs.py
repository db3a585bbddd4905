"""Writes the stubs of the lazy modules: ``python -m lightning_reg._stubs``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lightning_reg import catalogue

_HEADER = "# Written by `python -m lightning_reg._stubs`; a test keeps it current.\n"
_ENGINE = (
    "lightning_reg.engine",
    "lightning_reg.engine.exact_resume",
    "lightning_reg.engine.schedule",
    "lightning_reg.mechanisms.attribute_schedule",
    "lightning_reg.strategies",
)


def top_level() -> str:
    """The stub of ``lightning_reg``."""
    found = [*catalogue.techniques(), *catalogue.metrics(), *catalogue.monitors()]
    return _stub({c.__name__: c for c in found} | _engine_names()) + "\n__version__: str\n"


def functional() -> str:
    """The stub of ``lightning_reg.functional``."""
    return _stub(catalogue.functions())


def write() -> None:
    """Write both stubs beside their modules."""
    folder = Path(__file__).parent
    (folder / "__init__.pyi").write_text(top_level())
    (folder / "functional.pyi").write_text(functional())


def _engine_names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for path in _ENGINE:
        module = importlib.import_module(path)
        public = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == path and not name.startswith("_")
        ]
        names |= {name: getattr(module, name) for name in public}
    return names


def _stub(values: dict[str, Any]) -> str:
    lines = [f"from {value.__module__} import {name} as {name}" for name, value in values.items()]
    return _HEADER + "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    write()
