"""The table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_reg.compare.statistics import Cell, Row

COLUMNS = {
    "accuracy": ("accuracy %", 100.0, 1),
    "nll": ("NLL nats", 1.0, 3),
    "ece": ("ECE %", 100.0, 1),
    "entropy": ("entropy nats", 1.0, 3),
}
MARKS = {
    "better": "▲",
    "worse": "▼",
    "higher": "↑",
    "lower": "↓",
    "no difference": "=",
    "": "",
}
_STYLES = {"better": "green", "worse": "red", "no difference": "dim"}
LEGEND = (
    "mean ± standard deviation over seeds, held-out set, last epoch.  Against the baseline with "
    "the same seeds: ▲ better, ▼ worse, ↑ ↓ higher, lower, = no difference shown (the 95 % "
    "interval of the mean difference includes zero; not corrected for several comparisons)."
)
ONE_SEED = "One seed shows no spread, so no difference can be told from chance: use --seeds 5."


def number(cell: Cell, scale: float = 1.0, digits: int = 2) -> str:
    """``mean ± spread``."""
    text = f"{scale * cell.mean:.{digits}f}"
    return text if math.isnan(cell.spread) else f"{text} ± {scale * cell.spread:.{digits}f}"


def print_table(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print what a comparison found."""
    table = Table(title=title, title_justify="left")
    table.add_column("technique", overflow="fold")
    for label, _, _ in COLUMNS.values():
        table.add_column(label, justify="right")
    table.add_column("step time ×", justify="right")
    for row in rows:
        cells = [_styled(row.cells[name], scale, d) for name, (_, scale, d) in COLUMNS.items()]
        table.add_row(row.arm, *cells, number(row.time))
    console.print(table)
    one_seed = any(math.isnan(cell.spread) for row in rows for cell in row.cells.values())
    console.print(ONE_SEED if one_seed else LEGEND, style="dim")


def _styled(cell: Cell, scale: float, digits: int) -> str:
    text = f"{number(cell, scale, digits)} {MARKS[cell.verdict]}".rstrip()
    style = _STYLES.get(cell.verdict)
    return f"[{style}]{text}[/{style}]" if style else text
