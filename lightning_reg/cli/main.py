"""The command ``lightning-reg``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from lightning_reg.cli.command import Command, function_command
from lightning_reg.engine.errors import RegularizationError

_NO_PARSER = 'lightning-reg needs jsonargparse: pip install "lightning_reg[demo]"'


def commands() -> dict[str, Command]:
    """The subcommands by name."""
    from lightning_reg.cli import compare, listing

    return {
        "list": function_command(listing.list_techniques),
        "show": function_command(listing.show),
        "compare": compare.COMMAND,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    if importlib.util.find_spec("jsonargparse") is None:
        print(_NO_PARSER, file=sys.stderr)
        return 2
    from jsonargparse import ArgumentParser

    known = commands()
    parser = ArgumentParser(
        prog="lightning-reg", description="Regularization techniques for PyTorch Lightning."
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, command in known.items():
        subcommands.add_subcommand(name, command.parser(), help=command.help)
    parsed = parser.parse_args(arguments)
    try:
        return known[parsed.command].run(parsed[parsed.command])
    except (RegularizationError, ModuleNotFoundError) as error:
        # What a user can mend is one line; anything else is a defect and keeps its traceback.
        print(f"lightning-reg: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
