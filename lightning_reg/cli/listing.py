"""``lightning-reg list`` and ``lightning-reg show``."""

from __future__ import annotations

import inspect
import json as _json
from typing import Any

from lightning_reg import catalogue
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.optional import require


def list_techniques(family: str | None = None, json: bool = False) -> None:
    """List every technique and metric of the package.

    Args:
        family: only this family, for example ``labels``.
        json: print JSON instead of a table.
    """
    entries = [e for e in catalogue.entries() if family in (None, e.family)]
    if not entries:
        families = ", ".join(sorted({e.family for e in catalogue.entries()}))
        raise ArgumentError(
            "lightning-reg list",
            f"there is no family {family!r}; there are {families}",
            cure="lightning-reg list",
        )
    if json:
        print(_json.dumps([e.as_dict() for e in entries], indent=2))
        return
    _print_table(entries)


def show(name: str) -> None:
    """Print the card of one technique.

    Args:
        name: its class name, in any case.
    """
    cls = catalogue.find(name)
    console = require("rich.console", "cli", "lightning-reg show").Console()
    entry = next((e for e in catalogue.entries() if e.name == cls.__name__), None)
    console.rule(f"lightning_reg.{cls.__name__}")
    if entry is not None:
        _print_facts(console, entry)
    card = f"{inspect.getdoc(cls)}\n\n{cls.__name__}{inspect.signature(cls)}"
    console.print(card, markup=False, highlight=False, soft_wrap=True)


def _print_facts(console: Any, entry: catalogue.Entry) -> None:
    facts = {
        "family": entry.family,
        "mechanism": entry.mechanism,
        "used as": ", ".join(entry.kinds),
        "function": entry.function and f"lightning_reg.functional.{entry.function}",
        "needs": ", ".join(entry.signals),
        "over ranks": entry.semantics,
        "FSDP2": "works" if entry.sharded else "refused",
    }
    for label, value in facts.items():
        if value:
            console.print(f"{label:>10}: {value}", markup=False, highlight=False)
    for paper in entry.papers:
        console.print(f"     paper: {paper}", markup=False, highlight=False)
    for check, reason in entry.exemptions.items():
        console.print(f"    exempt: {check} ({reason})", markup=False, highlight=False)
    console.print()


def _print_table(entries: list[catalogue.Entry]) -> None:
    console = require("rich.console", "cli", "lightning-reg list").Console()
    # In a pipe there is no window to fit into, and cut names could not be searched for.
    console.width = console.width if console.is_terminal else 160
    table = require("rich.table", "cli", "lightning-reg list").Table(
        title=f"{len(entries)} techniques and metrics of lightning_reg"
    )
    for column in ("family", "class", "mechanism", "used as", "needs", "over ranks", "exempt"):
        table.add_column(column, no_wrap=column in ("family", "class"))
    for entry in entries:
        table.add_row(
            entry.family,
            entry.name,
            entry.mechanism or "",
            ", ".join(entry.kinds),
            ", ".join(entry.signals),
            entry.semantics or "",
            ", ".join(entry.exemptions),
        )
    console.print(table)
