"""Names that are imported when they are first asked for, as a stub file lists them.

Type checkers and editors read the same stub, so there is one list for both.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def attach(
    module: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a module whose stub lies beside it.

    Args:
        module: the module's ``__name__``.
        file: its ``__file__``.
    """
    homes = _homes(Path(file).with_suffix(".pyi"))

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[module], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[module]), *homes})

    return __getattr__, __dir__, sorted(homes)


def _homes(stub: Path) -> dict[str, str]:
    imports = (
        node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)
    )
    return {
        (alias.asname or alias.name): node.module
        for node in imports
        if node.module is not None
        for alias in node.names
    }
