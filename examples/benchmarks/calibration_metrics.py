"""Time and state of calibration metrics, against torchmetrics, netcal and torch-uncertainty.

Run ``python examples/benchmarks/calibration_metrics.py``; ``--sizes 10000x100 100000x1000`` picks
sizes. netcal and torch-uncertainty are left out where they are not installed
(``pip install netcal torch-uncertainty``). Every ratio comes from interleaved rounds of one run:
update and compute on float32 logits, one thread, in processor time. What the others can only be
given as probabilities is timed with its softmax.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError

from lightning_reg.metrics import (
    BrierScore,
    CalibrationError,
    CalibrationSuite,
    NegativeLogLikelihood,
)

SIZES = ("10000x100", "100000x1000", "10000000x10")
CLASSWISE = (20_000, 1000)


class Data(NamedTuple):
    """Logits (N, C) and labels (N,), of which seven in ten are the top class."""

    logits: Tensor
    target: Tensor

    @classmethod
    def draw(cls, rows: int, classes: int) -> Data:
        """Random logits of a standard deviation of 2."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, classes, generator=generator).mul_(2)
        other = torch.randint(0, classes, (rows,), generator=generator)
        right = torch.rand(rows, generator=generator) < 0.7
        return cls(logits, torch.where(right, logits.argmax(1), other))


Contender = Callable[[Data], Any]


def main() -> None:
    """Measure and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for size in arguments.sizes:
        rows, classes = (int(part) for part in size.split("x"))
        baseline = f"torchmetrics MulticlassCalibrationError({classes}, 15)"
        contenders = {baseline: torchmetrics_error, **ours(), **netcal()}
        report(f"{rows} x {classes}", contenders, Data.draw(rows, classes), arguments.rounds)
    classwise = {**torch_uncertainty(), **ours_by_class()}
    report(
        f"classwise, {CLASSWISE[0]} x {CLASSWISE[1]}",
        classwise,
        Data.draw(*CLASSWISE),
        min(arguments.rounds, 3),
    )


def report(title: str, contenders: dict[str, Contender], data: Data, rounds: int) -> None:
    """Print the times of each contender, and its ratio to the first one in the same round."""
    times, state = measure(contenders, data, rounds)
    baseline = times[next(iter(contenders))]
    print(f"\n{title}\n\n| metric | seconds | ratio | spread | state, bytes |")
    print("| --- | --- | --- | --- | --- |")
    for name, seconds in times.items():
        ratios = [s / b for s, b in zip(seconds, baseline, strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        middle, ratio = statistics.median(seconds), statistics.median(ratios)
        print(f"| {name} | {middle:.3f} | {ratio:.3f} | {spread} | {state[name]} |", flush=True)


def measure(
    contenders: dict[str, Contender], data: Data, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Processor seconds by round, each round going through all contenders, and their states."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    state: dict[str, str] = {}
    for number in range(rounds):
        names = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in names:
            start = time.process_time()
            metric = contenders[name](data)
            times[name].append(time.process_time() - start)
            state[name] = bytes_of(metric)
            del metric
    return times, state


def bytes_of(metric: Any) -> str:
    """The size of what a metric keeps."""
    if not isinstance(metric, Metric):
        return "-"
    total = 0
    for value in metric.metric_state.values():
        tensors = value if isinstance(value, list) else [value]
        total += sum(t.numel() * t.element_size() for t in tensors)
    return str(total)


def fed(metric: Metric, preds: Tensor, target: Tensor) -> Metric:
    """The metric after one update and one compute."""
    metric.update(preds, target)
    metric.compute()
    return metric


def torchmetrics_error(data: Data) -> Metric:
    """The calibration error of torchmetrics."""
    return fed(MulticlassCalibrationError(data.logits.shape[1], 15), *data)


def ours() -> dict[str, Contender]:
    """The metrics of this package that judge top labels."""
    return {
        "CalibrationError": lambda data: fed(CalibrationError(from_logits=True), *data),
        "CalibrationSuite (37 values)": lambda data: fed(CalibrationSuite(from_logits=True), *data),
        "NegativeLogLikelihood": lambda data: fed(NegativeLogLikelihood(from_logits=True), *data),
        "BrierScore": lambda data: fed(BrierScore(from_logits=True), *data),
    }


def ours_by_class() -> dict[str, Contender]:
    """The classwise error of this package."""

    def by_class(data: Data) -> Metric:
        classes = data.logits.shape[1]
        metric = CalibrationError(from_logits=True, view="classwise", num_classes=classes)
        return fed(metric, *data)

    return {'CalibrationError(view="classwise")': by_class}


def netcal() -> dict[str, Contender]:
    """The ECE of netcal, if it is installed."""
    found = optional("netcal.metrics")
    if found is None:
        return {}
    return {
        "netcal ECE(15)": lambda data: found.ECE(15).measure(
            data.logits.softmax(1).numpy(), data.target.numpy()
        )
    }


def torch_uncertainty() -> dict[str, Contender]:
    """torch-uncertainty's classwise ECE, if it is installed."""
    found = optional(
        "torch_uncertainty.metrics.classification.calibration.classwise_calibration_error"
    )
    if found is None:
        return {}
    return {
        "torch-uncertainty ClasswiseCalibrationError": lambda data: fed(
            found.ClasswiseCalibrationError(data.logits.shape[1], 15),
            data.logits.softmax(1),
            data.target,
        )
    }


def optional(module: str) -> Any:
    """A module, or None and a line that says why not."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        print(f"without {module.partition('.')[0]}: {type(error).__name__}: {error}")
        return None


if __name__ == "__main__":
    main()
