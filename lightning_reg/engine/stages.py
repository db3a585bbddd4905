"""What a Trainer is doing."""

from __future__ import annotations

from typing import Any


def fitting(trainer: Any) -> bool:
    """Whether this belongs to a fit, as its validation does.

    By name, since Lightning has two import names and each its own enumeration.
    """
    return getattr(trainer.state.fn, "value", None) == "fit"


__all__ = ["fitting"]
