"""Figures on their way to the Trainer's loggers, or to files where a logger takes none."""

from __future__ import annotations

import importlib.util
import json
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Loggers that failed once: each is warned of once, whichever monitor met it.
_FAILED: weakref.WeakSet[Any] = weakref.WeakSet()


class Drawing(NamedTuple):
    """A figure and the numbers that it shows.

    Attributes:
        figure: of matplotlib.
        numbers: by name; go to the JSON file.
    """

    figure: Figure
    numbers: Mapping[str, Any]


def have_matplotlib() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def write_figure(trainer: pl.Trainer, tag: str, draw: Callable[[], Drawing]) -> None:
    """Hand a figure to every logger that takes one; PNG and JSON files for those that do not.

    - TensorBoard: an image under ``tag`` at the step;
    - W&B: an image under ``tag`` with ``trainer/global_step``;
    - MLflow: an artifact ``figures/<tag>/step_<step>.png``;
    - any other logger, none at all, and one that fails (with one warning): ``figures/`` in the
      Trainer's ``log_dir``.

    Every rank has to call it, since the ranks agree on the folder; rank 0 draws and writes. Under
    ``fast_dev_run`` the figure is drawn and nothing is written, like all that a Trainer logs.

    Args:
        trainer: whose loggers, or ``log_dir``.
        tag: the figure's name, with slashes: ``"val/reliability"``.
        draw: makes the figure.
    """
    folder = trainer.log_dir or trainer.default_root_dir
    if not trainer.is_global_zero:
        return
    drawing, step = draw(), int(trainer.global_step)
    taken = [_hand_over(logger, tag, drawing.figure, step) for logger in trainer.loggers]
    if getattr(trainer, "fast_dev_run", False):
        return
    if not taken or not all(taken):
        _write_files(Path(folder) / "figures", tag, drawing, step)


def _hand_over(logger: Any, tag: str, figure: Figure, step: int) -> bool:
    """Whether the logger took it; a logger that fails must not end a training."""
    try:
        return _take(logger, tag, figure, step)
    except Exception as error:
        if logger not in _FAILED:
            _FAILED.add(logger)
            rank_zero_warn(
                f"{type(logger).__name__} took no figure ({type(error).__name__}: {error}); "
                "figures go to files in `trainer.log_dir` instead."
            )
        return False


def _take(logger: Any, tag: str, figure: Figure, step: int) -> bool:
    """By what the logger can do, since both of Lightning's import names have their own classes."""
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_figure", None)):
        experiment.add_figure(tag, figure, step, close=False)
        return True
    if callable(getattr(logger, "log_image", None)):
        logger.log_image(tag, [figure], step=step)
        return True
    if callable(getattr(experiment, "log_figure", None)) and hasattr(logger, "run_id"):
        experiment.log_figure(logger.run_id, figure, f"figures/{tag}/step_{step:08d}.png")
        return True
    return False


def _write_files(folder: Path, tag: str, drawing: Drawing, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{tag.replace('/', '_')}_step_{step:08d}"
    drawing.figure.savefig(folder / f"{name}.png", dpi=120)
    numbers = _plain({"step": step, **drawing.numbers})
    (folder / f"{name}.json").write_text(json.dumps(numbers, indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
