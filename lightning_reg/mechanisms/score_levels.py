"""Scores of samples that a batch brings beside the labels, and the levels that they lie on.

What a technique finds with :func:`read_scores`: one number for each sample, a mean or a deviation,
from an item of the batch or as a constant, with an error that names the technique, the place that
was looked at, and the line that cures. :func:`level_scores` are the scores of the classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_reg.engine import MissingSignalError, RegularizationError, Step
from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.signals import describe, read_path

Place = str | float
ScoreRange = Sequence[float] | None


def check_place(owner: object, argument: str, place: Place) -> None:
    """Raise :class:`ArgumentError` unless ``place`` names an item of the batch or is a number."""
    cure = f'{type(owner).__name__}({argument}="batch.<key>")'
    if not isinstance(place, str):
        check_range(owner, argument, place, 0, cure=cure)
    elif not place.startswith("batch."):
        problem = f'`{argument}` must name a place like "batch.<key>", got {place!r}'
        raise ArgumentError(owner, problem, cure=cure)


def check_score_range(owner: object, score_range: ScoreRange) -> tuple[float, float] | None:
    """The scores of the first and the last level; ``None`` stands for 1 and their number."""
    if score_range is None:
        return None
    ends = tuple(score_range)
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ArgumentError(
            owner,
            f"`score_range` must be two increasing numbers, got {score_range!r}",
            cure=f"{type(owner).__name__}(score_range=(1, 5))",
        )
    return ends


def level_scores(score_range: tuple[float, float] | None, classes: int, like: Tensor) -> Tensor:
    """The scores (C,) of evenly spaced levels, in the type of ``like``."""
    low, high = score_range or (1.0, float(classes))
    return torch.linspace(low, high, classes, dtype=like.dtype, device=like.device)


def read_scores(owner: object, step: Step, place: Place, size: int, like: Tensor) -> Tensor:
    """What the batch has at ``place`` (size,), in the type of ``like``.

    Raises:
        MissingSignalError: if there is nothing.
        RegularizationError: if it is not one number for each of ``size`` samples.
    """
    if not isinstance(place, str):
        return torch.full((size,), float(place), dtype=like.dtype, device=like.device)
    try:
        found = read_path({"batch": step.batch}, place)
    except KeyError as error:
        raise MissingSignalError(
            owner,
            f"needs a number for each sample at {place!r} and found none in the first "
            f"{step.hook}; there is {describe(step.batch)}",
            cure='"batch.<a key or position of the batch>"',
        ) from error
    values = torch.as_tensor(found).to(like).reshape(-1)
    if len(values) != size:
        raise RegularizationError(
            owner,
            f"needs a number for each of {size} samples at {place!r}, and found {len(values)}",
            cure='"batch.<a key or position of the batch>"',
        )
    return values


__all__ = ["Place", "ScoreRange", "check_place", "check_score_range", "level_scores", "read_scores"]
