"""Errors that name the technique, what was wrong, and the line that cures it."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException


class RegularizationError(MisconfigurationException):
    """Something about a technique has to change before training can go on.

    Args:
        owner: the technique: an instance, its class, or its name.
        problem: what was wrong, with the value that was given.
        cure: a line of code that works.
    """

    def __init__(self, owner: object, problem: str, *, cure: str | None = None) -> None:
        self.owner = owner_name(owner)
        self.problem = problem.rstrip(". ")
        self.cure = cure
        super().__init__(f"{self.owner}: {self.problem}." + (f" Try: {cure}" if cure else ""))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries; the default calls __init__ with the message alone.
        return (_rebuild, (type(self), self.owner, self.problem, self.cure))


class ArgumentError(RegularizationError, ValueError):
    """An argument is outside its range."""


class MissingSignalError(RegularizationError, LookupError):
    """A technique needs a tensor of the training step that could not be found."""


class ConflictError(RegularizationError):
    """Two techniques, or a technique and something else of the run, exclude each other."""


class UnsupportedError(RegularizationError):
    """A technique cannot be right in this Trainer or on this module."""


def owner_name(owner: object) -> str:
    """The name under which an error speaks of ``owner``."""
    if isinstance(owner, str):
        return owner
    return owner.__name__ if isinstance(owner, type) else type(owner).__name__


def check_range(
    owner: object,
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    low_open: bool = False,
    high_open: bool = False,
    cure: str | None = None,
) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is a number from ``low`` to ``high``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # A NaN fails every comparison, so the conditions are written to hold for good values only.
    above = is_number and (low is None or (value > low if low_open else value >= low))
    below = is_number and (high is None or (value < high if high_open else value <= high))
    if not (is_number and value == value and above and below):
        interval = _interval(low, high, low_open, high_open)
        raise ArgumentError(owner, f"`{name}` must be {interval}, got {value!r}", cure=cure)


def _interval(low: float | None, high: float | None, low_open: bool, high_open: bool) -> str:
    if low is None and high is None:
        return "a number"
    if high is None:
        return f"{'above' if low_open else 'at least'} {low}"
    if low is None:
        return f"{'below' if high_open else 'at most'} {high}"
    return f"in {'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"


def _rebuild(
    kind: type[RegularizationError], owner: str, problem: str, cure: str | None
) -> RegularizationError:
    return kind(owner, problem, cure=cure)
