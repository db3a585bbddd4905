"""What a subcommand of ``lightning-reg`` is made of."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        help: one line for the list of subcommands.
        parser: makes its jsonargparse parser.
        run: does the work with the parsed arguments; returns the exit status.
    """

    help: str
    parser: Callable[[], Any]
    run: Callable[[Any], int]


def function_command(function: Callable[..., None]) -> Command:
    """A subcommand whose arguments are those of a function, and whose help is its docstring."""

    def make_parser() -> Any:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(description=summary)
        flags = {n: p for n, p in inspect.signature(function).parameters.items() if _is_flag(p)}
        parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(flags))
        for name in flags:
            parser.add_argument(f"--{name}", action="store_true", help=_help_of(function, name))
        return parser

    def run(arguments: Any) -> int:
        function(**vars(arguments))
        return 0

    summary = (function.__doc__ or "").strip().splitlines()[0]
    return Command(summary, make_parser, run)


def _is_flag(parameter: inspect.Parameter) -> bool:
    return parameter.default is False


def _help_of(function: Callable[..., None], name: str) -> str:
    found = re.search(rf"^\s*{name}: (.*)$", function.__doc__ or "", re.MULTILINE)
    return found.group(1) if found else ""
