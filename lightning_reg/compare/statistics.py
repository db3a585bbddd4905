"""Means, spreads, and which differences the seeds can show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_reg.compare.run import METRICS, Run
from lightning_reg.compare.settings import BASELINE

# Whether more is better; of the entropy neither is.
DIRECTION = {"accuracy": 1, "nll": -1, "ece": -1, "entropy": 0}
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A quantity of one arm over its seeds.

    Attributes:
        mean: over seeds.
        spread: the standard deviation over seeds; NaN for one seed.
        verdict: against the baseline: ``"better"``, ``"worse"``, ``"higher"``, ``"lower"``,
            ``"no difference"``, or ``""`` where there is nothing to compare.
    """

    mean: float
    spread: float
    verdict: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        arm: the techniques.
        cells: by name, of the metrics.
        time: the time of a training step over that of the baseline with the same seed.
        step_ms: the median time of a step, over seeds.
    """

    arm: str
    cells: dict[str, Cell]
    time: Cell
    step_ms: float


def summarize(runs: Sequence[Run]) -> list[Row]:
    """The table, the baseline first."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    of = {arm: sorted((r for r in runs if r.arm == arm), key=lambda r: r.seed) for arm in arms}
    base = of[BASELINE]
    return [_row(arm, of[arm], base) for arm in arms]


def verdict(values: Sequence[float], baseline: Sequence[float], direction: int) -> str:
    """What the seeds show of a difference: each is compared with the baseline's same seed.

    A difference is shown if the 95 % interval of its mean (Student's t) leaves out zero. One
    seed shows nothing.
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    if len(differences) < 2:
        return ""
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    quantile = _T95[min(len(differences) - 1, len(_T95)) - 1]
    if not abs(mean) > quantile * error:
        return "no difference"
    if direction == 0:
        return "higher" if mean > 0 else "lower"
    return "better" if mean * direction > 0 else "worse"


def _row(arm: str, runs: Sequence[Run], base: Sequence[Run]) -> Row:
    cells = {}
    for name in METRICS:
        values, reference = [r.values[name] for r in runs], [r.values[name] for r in base]
        shown = "" if arm == BASELINE else verdict(values, reference, DIRECTION[name])
        cells[name] = Cell(*_mean_and_spread(values), shown)
    ratios = [r.step_ms / b.step_ms for r, b in zip(runs, base, strict=True)]
    return Row(
        arm, cells, Cell(*_mean_and_spread(ratios)), statistics.fmean(r.step_ms for r in runs)
    )


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.fmean(values), spread
