"""Techniques, and the user's own classes, as they are written on a command line."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.callbacks import Callback

import lightning_reg
from lightning_reg import catalogue
from lightning_reg.engine.errors import ArgumentError

_OWNER = "lightning-reg compare"
_EXAMPLE = '--techniques SAM "SAM(rho=0.1)" SAM+EarlyLearning'


@dataclass(frozen=True)
class Spec:
    """A class and its arguments: ``SAM(rho=0.1)``.

    Attributes:
        name: a name of ``lightning_reg``, or a dotted import path.
        arguments: by keyword.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, defaults: Mapping[str, Any] | None = None) -> Any:
        """An instance.

        Args:
            defaults: arguments that the run knows (``num_classes``), for those of the class's
                parameters that have these names and were not written.
        """
        kind = find_class(self.name)
        known = inspect.signature(kind).parameters
        fitting = {k: v for k, v in (defaults or {}).items() if k in known and v is not None}
        try:
            return kind(**{**fitting, **self.arguments})
        except TypeError as error:
            raise ArgumentError(
                self.name,
                f"does not take these arguments ({error})",
                cure=f"{self.name}{inspect.signature(kind)}".replace("'", ""),
            ) from error


def parse_arm(text: str) -> tuple[Spec, ...]:
    """The techniques of one training: ``"SAM(rho=0.1)+EarlyLearning"``.

    Raises:
        ArgumentError: if the text is no such list, or a name is unknown.
    """
    parts = _flatten(_parsed(text), text)
    specs = tuple(_spec(part, text) for part in parts)
    for spec in specs:
        kind = find_class(spec.name)
        if not (isinstance(kind, type) and issubclass(kind, Callback)):
            raise ArgumentError(
                spec.name,
                "is no callback: your LightningModule would have to subclass it",
                cure="lightning-reg list",
            )
    return specs


def parse_class(text: str) -> Spec:
    """One class by import path, with arguments if any: ``"my.package.Net(width=64)"``."""
    return _spec(_parsed(text), text)


def find_class(name: str) -> Any:
    """A public class of the package, or one by its import path.

    Raises:
        ArgumentError: if there is none, with the names that are near.
    """
    if "." in name:
        return _imported(name)
    public = getattr(lightning_reg, name, None)
    return public if isinstance(public, type) else catalogue.find(name)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            _OWNER,
            f"cannot import {path!r} ({error})",
            cure="run it in the folder that holds your package, or set PYTHONPATH",
        ) from error


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ArgumentError(_OWNER, f"cannot read {text!r}", cure=_EXAMPLE) from error


def _flatten(node: ast.expr, text: str) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_flatten(node.left, text), *_flatten(node.right, text)]
    return [node]


def _spec(node: ast.expr, text: str) -> Spec:
    if isinstance(node, ast.Call):
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ArgumentError(_OWNER, f"{text!r}: arguments are written by name", cure=_EXAMPLE)
        arguments = {str(k.arg): _value(k.value, text) for k in node.keywords}
        return Spec(_dotted(node.func, text), arguments)
    return Spec(_dotted(node, text))


def _value(node: ast.expr, text: str) -> Any:
    """A literal, or an object such as a schedule."""
    if isinstance(node, ast.Call):
        return _spec(node, text).build()
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ArgumentError(
            _OWNER, f"{text!r}: {ast.unparse(node)} is no number, string or list", cure=_EXAMPLE
        ) from error


def _dotted(node: ast.expr, text: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, text)}.{node.attr}"
    raise ArgumentError(_OWNER, f"{text!r} is no list of techniques", cure=_EXAMPLE)
