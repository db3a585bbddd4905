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
    from lightning_reg.cli import compare, fit, listing

    return {
        "list": function_command(listing.list_techniques),
        "show": function_command(listing.show),
        "compare": compare.COMMAND,
        "fit": fit.COMMAND,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    if importlib.util.find_spec("jsonargparse") is None:
        print(_NO_PARSER, file=sys.stderr)
        return 2
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:
        # Own classes are looked for where the command is run, as `python -m` does.
        sys.path.insert(0, "")
    try:
        return _dispatch(given)
    except (RegularizationError, ModuleNotFoundError) as error:
        # What a user can mend is one line; anything else is a defect and keeps its traceback.
        print(f"lightning-reg: {error}", file=sys.stderr)
        return 2


def _dispatch(given: list[str]) -> int:
    from jsonargparse import ArgumentParser

    if given[:1] == ["fit"]:
        from lightning_reg.cli.fit import fit

        return fit(given[1:])
    known = commands()
    parser = ArgumentParser(
        prog="lightning-reg", description="Regularization techniques for PyTorch Lightning."
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, command in known.items():
        subcommands.add_subcommand(name, command.parser(), help=command.help)
    parsed = parser.parse_args(given)
    return known[parsed.command].run(parsed[parsed.command])


if __name__ == "__main__":
    sys.exit(main())
