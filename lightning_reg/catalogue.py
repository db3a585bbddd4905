"""What the package holds, found by looking at its classes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from lightning_reg import calibrators as _calibrators
from lightning_reg import metrics as _metrics
from lightning_reg import monitors as _monitors
from lightning_reg import techniques as _techniques
from lightning_reg.engine.checks import right_when_sharded
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.technique import Technique

_MECHANISMS = "lightning_reg.mechanisms."


@dataclass(frozen=True)
class Entry:
    """One technique, metric or calibrator.

    Attributes:
        name: its class, importable from ``lightning_reg``.
        family: the folder that it lives in.
        mechanism: its way of acting; ``None`` for mixins and metrics that have none.
        kinds: how it can be used: ``"callback"``, ``"mixin"``, ``"function"``, ``"metric"``,
            ``"calibrator"``.
        papers: what it implements.
        function: the name of its function in ``lightning_reg.functional``.
        signals: what it needs from the training step.
        semantics: over ranks; ``None`` for metrics, which are exact over ranks.
        sharded: whether it works where FSDP2 shards weights over ranks.
        exemptions: checks of the contract that it is exempt from, with the reasons.
        summary: the first line of its card.
    """

    name: str
    family: str
    mechanism: str | None
    kinds: tuple[str, ...]
    papers: tuple[Paper, ...]
    function: str | None
    signals: tuple[str, ...]
    semantics: str | None
    sharded: bool
    exemptions: dict[str, str]
    summary: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the name is under ``"class"``."""
        values = asdict(self)
        return {"class": values.pop("name"), **values}


def techniques() -> list[type[Technique]]:
    """Every technique, callbacks and mixins, by name."""
    return _classes(_techniques, Technique)


def callbacks() -> list[type[Regularizer]]:
    """The techniques that are added to a Trainer."""
    return [t for t in techniques() if issubclass(t, Regularizer)]


def mixins() -> list[type[Technique]]:
    """The techniques that a LightningModule subclasses."""
    return [t for t in techniques() if not issubclass(t, Regularizer)]


def metrics() -> list[type[Any]]:
    """Every metric class, by name."""
    from torchmetrics import Metric

    return _classes(_metrics, Metric)


def monitors() -> list[type[Any]]:
    """Every monitor, by name."""
    from lightning.pytorch.callbacks import Callback

    return _classes(_monitors, Callback)


def calibrators() -> list[type[Any]]:
    """Every post-hoc calibrator, by name."""
    from lightning_reg.calibrators.calibrator import Calibrator

    return _classes(_calibrators, Calibrator)


def functions() -> dict[str, Callable[..., Any]]:
    """The public functions of techniques, metrics and calibrators, by name."""
    found = {}
    for module in [*_modules(_techniques), *_modules(_metrics), *_modules(_calibrators)]:
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                found[name] = value
    return dict(sorted(found.items()))


def entries() -> list[Entry]:
    """Techniques, metrics and calibrators as the command line lists them."""
    found = [_entry(c) for c in techniques()]
    found += [_plain_entry(c, "metric") for c in metrics()]
    found += [_plain_entry(c, "calibrator") for c in calibrators()]
    return sorted(found, key=lambda e: (e.family, e.name))


def find(name: str) -> type[Any]:
    """A technique, metric, calibrator or monitor by its class name, in any case.

    Raises:
        ArgumentError: if there is none; the message holds the nearest names.
    """
    classes = [*techniques(), *metrics(), *calibrators(), *monitors()]
    known = {c.__name__: c for c in classes}
    lower = {key.lower(): key for key in known}
    if name.lower() in lower:
        return known[lower[name.lower()]]
    near = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)]
    raise ArgumentError(
        "lightning_reg",
        f"there is no technique named {name!r}"
        + (f"; did you mean {' or '.join(near)}" if near else ""),
        cure="lightning-reg list",
    )


def _entry(cls: type[Technique]) -> Entry:
    kinds = ("callback",) if issubclass(cls, Regularizer) else ("mixin",)
    return Entry(
        name=cls.__name__,
        family=_family(cls),
        mechanism=_mechanism(cls),
        kinds=kinds + (("function",) if cls.function is not None else ()),
        papers=cls.papers,
        function=getattr(cls.function, "__name__", None),
        signals=cls.needs,
        semantics=cls.semantics,
        sharded=right_when_sharded(cls),
        exemptions=dict(cls.exemptions),
        summary=_summary(cls),
    )


def _plain_entry(cls: type[Any], kind: str) -> Entry:
    function = getattr(cls, "function", None)
    return Entry(
        name=cls.__name__,
        family=f"{kind}s",
        mechanism=None,
        kinds=(kind,) + (("function",) if function is not None else ()),
        papers=getattr(cls, "papers", ()),
        function=getattr(function, "__name__", None),
        signals=(),
        semantics=None,
        sharded=True,
        exemptions={},
        summary=_summary(cls),
    )


def _family(cls: type[Any]) -> str:
    return cls.__module__.split(".")[2]


def _mechanism(cls: type[Any]) -> str | None:
    found = (b.__name__ for b in cls.__mro__ if b.__module__.startswith(_MECHANISMS))
    return next(found, None)


def _summary(cls: type[Any]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _classes(package: ModuleType, base: type[Any]) -> list[type[Any]]:
    found = {
        value.__name__: value
        for module in _modules(package)
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
        and not inspect.isabstract(value)
        and value.__name__ in getattr(module, "__all__", ())
    }
    return [found[name] for name in sorted(found)]


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not info.ispkg:
            yield importlib.import_module(info.name)
