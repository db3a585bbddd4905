"""Figures on their way to the Trainer's loggers, or to files where a logger takes none."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


def have_matplotlib() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def write_figure(
    trainer: pl.Trainer, tag: str, draw: Callable[[], Any], data: Mapping[str, Any]
) -> None:
    """Hand a figure to every logger that takes one; without any, write PNG and JSON files.

    Every rank has to call it, since the ranks agree on the folder; rank 0 draws and writes.

    Args:
        trainer: whose loggers, or ``log_dir``.
        tag: the figure's name, with slashes: ``"val/reliability"``.
        draw: makes the matplotlib figure.
        data: the numbers behind it, for the JSON file.
    """
    folder = trainer.log_dir or trainer.default_root_dir
    if not trainer.is_global_zero:
        return
    figure = draw()
    step = int(trainer.global_step)
    taken = [_hand_over(logger, tag, figure, step) for logger in trainer.loggers]
    if not any(taken):
        _write_files(Path(folder) / "figures", tag, figure, step, data)


def _hand_over(logger: Any, tag: str, figure: Any, step: int) -> bool:
    """By what the logger can do, since both of Lightning's import names have their own classes."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(tag, figure, step, close=False)
        return True
    if hasattr(logger, "log_image"):
        logger.log_image(tag, [figure], step=step)
        return True
    if hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):
        experiment.log_figure(logger.run_id, figure, f"{_file_name(tag, step)}.png")
        return True
    return False


def _write_files(folder: Path, tag: str, figure: Any, step: int, data: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = _file_name(tag, step)
    figure.savefig(folder / f"{name}.png", dpi=120)
    (folder / f"{name}.json").write_text(json.dumps({"step": step, **data}, indent=1))


def _file_name(tag: str, step: int) -> str:
    return f"{tag.replace('/', '_')}_step_{step:08d}"
