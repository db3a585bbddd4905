"""Imports of packages that only some users have."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str, what: str) -> Any:
    """Import ``module``, or say which extra brings it.

    Args:
        module: the module's import name.
        extra: the extra of this package that installs it.
        what: who needs it, for the message.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f'{what} needs {package}. Try: pip install "lightning_reg[{extra}]"', name=error.name
        ) from error
