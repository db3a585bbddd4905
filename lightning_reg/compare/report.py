"""The report: one HTML file without links to others, and the numbers behind it as CSV."""

from __future__ import annotations

import csv
import html
import platform
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import lightning
import torch

from lightning_reg.compare import figures
from lightning_reg.compare.run import METRICS, Run
from lightning_reg.compare.statistics import Row
from lightning_reg.compare.table import COLUMNS, LEGEND, MARKS, ONE_SEED, number

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: .35em .8em; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
.better { color: #2b7a3d; } .worse { color: #b3382a; } .same { color: #777; }
img { max-width: 100%; } .note { color: #666; font-size: .9em; }
"""


def write_report(
    folder: Path, runs: Sequence[Run], rows: Sequence[Row], title: str, command: str
) -> Path:
    """Write ``report.html``, ``runs.csv``, ``curves.csv`` and ``reliability.csv``.

    Args:
        folder: made if it does not exist.
        runs: all trainings.
        rows: the table.
        title: what was compared.
        command: the line that gives this report again.

    Returns:
        The path of the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "runs.csv", _run_lines(runs))
    _write_csv(folder / "curves.csv", _curve_lines(runs))
    _write_csv(folder / "reliability.csv", _bin_lines(runs))
    path = folder / "report.html"
    path.write_text(_page(runs, rows, title, command), encoding="utf-8")
    return path


def _page(runs: Sequence[Run], rows: Sequence[Row], title: str, command: str) -> str:
    one_seed = len({run.seed for run in runs}) == 1
    scatter = figures.accuracy_against_calibration(runs, rows)
    sections = [
        ("Accuracy against calibration", figures.as_image(scatter, "accuracy against ECE")),
        (
            "Reliability diagrams, all seeds pooled",
            figures.as_image(figures.reliability(runs), "reliability diagrams"),
        ),
        (
            "Learning curves on the held-out set",
            figures.as_image(figures.learning_curves(runs), "learning curves"),
        ),
        ("Settings", _settings_table(runs[0])),
    ]
    body = "\n".join(f"<h2>{heading}</h2>\n{content}" for heading, content in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p><code>{html.escape(command)}</code></p>
{_result_table(rows)}
<p class="note">{html.escape(ONE_SEED if one_seed else LEGEND)} Step time is the median time of a
training step over that of the baseline with the same seed, trained next to it.</p>
{body}
<p class="note">lightning_reg on lightning {lightning.__version__}, torch {torch.__version__},
Python {platform.python_version()}. Numbers: runs.csv, curves.csv, reliability.csv.</p>
</body></html>
"""


def _result_table(rows: Sequence[Row]) -> str:
    labels = ["technique", *(label for label, _, _ in COLUMNS.values()), "step time ×", "step ms"]
    head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    lines = []
    for row in rows:
        cells = [f"<td>{html.escape(row.arm)}</td>"]
        for name, (_, scale, digits) in COLUMNS.items():
            cell = row.cells[name]
            style = {"better": "better", "worse": "worse"}.get(cell.verdict, "")
            style = "same" if cell.verdict == "no difference" else style
            text = f"{number(cell, scale, digits)} {MARKS[cell.verdict]}".rstrip()
            cells.append(f'<td class="{style}" title="{cell.verdict}">{text}</td>')
        cells += [f"<td>{number(row.time)}</td>", f"<td>{row.step_ms:.2f}</td>"]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _settings_table(run: Run) -> str:
    settings = run.settings
    lines = [
        f"<tr><td>{f.name}</td><td>{html.escape(str(getattr(settings, f.name)))}</td></tr>"
        for f in fields(settings)
    ]
    return f"<table>{''.join(lines)}</table>"


def _run_lines(runs: Sequence[Run]) -> Iterable[Sequence[object]]:
    yield ("technique", "seed", *METRICS, "step_ms")
    for run in runs:
        yield (run.arm, run.seed, *(run.values[name] for name in METRICS), run.step_ms)


def _curve_lines(runs: Sequence[Run]) -> Iterable[Sequence[object]]:
    yield ("technique", "seed", "epoch", *METRICS)
    for run in runs:
        for epoch, values in enumerate(run.curves, 1):
            yield (run.arm, run.seed, epoch, *(values[name] for name in METRICS))


def _bin_lines(runs: Sequence[Run]) -> Iterable[Sequence[object]]:
    yield ("technique", "seed", "bin", "count", "confidence_sum", "correct_sum")
    for run in runs:
        for position, values in enumerate(zip(*run.bins, strict=True)):
            yield (run.arm, run.seed, position, *values)


def _write_csv(path: Path, lines: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
