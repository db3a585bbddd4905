"""Writes the stubs of the lazy modules: ``python -m lightning_reg._stubs``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lightning_reg import catalogue

_HEADER = "# Written by `python -m lightning_reg._stubs`; a test keeps it current.\n"
_ENGINE = (
    "lightning_reg.engine",
    "lightning_reg.engine.closed_loop",
    "lightning_reg.engine.exact_resume",
    "lightning_reg.engine.resume",
    "lightning_reg.engine.schedule",
    "lightning_reg.mechanisms.attribute_schedule",
    "lightning_reg.strategies",
)


def top_level() -> str:
    """The stub of ``lightning_reg``."""
    found = [
        *catalogue.techniques(),
        *catalogue.metrics(),
        *catalogue.calibrators(),
        *catalogue.monitors(),
    ]
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
        public = getattr(module, "__all__", None) or list(vars(module))
        found = {name: getattr(module, name) for name in public if not name.startswith("_")}
        names |= {name: value for name, value in found.items() if _is_own(value, path)}
    return names


def _is_own(value: Any, path: str) -> bool:
    """Whether a class or function lives in ``path``, so that type aliases are left out."""
    return callable(value) and getattr(value, "__module__", "").startswith(path)


def _stub(values: dict[str, Any]) -> str:
    lines = [f"from {value.__module__} import {name} as {name}" for name, value in values.items()]
    return _HEADER + "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    write()
