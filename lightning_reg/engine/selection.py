"""Which parameters a technique acts on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_reg.engine.errors import ArgumentError


class ParameterSelection:
    """Chooses parameters by module type, by name and by shape.

    The default takes every ``weight`` of two or more dimensions and leaves out biases and
    normalization layers. A tied weight counts once, under its first name. Frozen parameters
    are never chosen.

    Args:
        types: module types whose parameters count, as classes or as names (``"Linear"``,
            ``"torch.nn.Linear"``); ``None`` takes every type but normalization layers.
        pattern: a regular expression that has to occur in the parameter's name.
        exclude: a regular expression that must not occur in it.
        min_ndim: the least number of dimensions.
        parameter: the attribute of the module; ``None`` takes all of its parameters.

    Raises:
        ArgumentError: if an argument has no meaning; when selecting, if nothing is chosen.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
        >>> list(ParameterSelection(exclude="^2").select(net))
        ['0.weight']
    """

    def __init__(
        self,
        types: Sequence[type[nn.Module] | str] | None = None,
        pattern: str | None = None,
        exclude: str | None = None,
        min_ndim: int = 2,
        parameter: str | None = "weight",
    ) -> None:
        if isinstance(types, (type, str)):
            types = (types,)
        if types is not None and not all(isinstance(t, (type, str)) for t in types):
            raise ArgumentError(
                self,
                f"`types` must be module classes or their names, got {types!r}",
                cure='ParameterSelection(types=["Linear"])',
            )
        for name, expression in (("pattern", pattern), ("exclude", exclude)):
            self._check_expression(name, expression)
        if not isinstance(min_ndim, int) or min_ndim < 0:
            raise ArgumentError(
                self,
                f"`min_ndim` must be a whole number from 0, got {min_ndim!r}",
                cure="ParameterSelection(min_ndim=2)",
            )
        self.types = None if types is None else tuple(types)
        self.pattern = pattern
        self.exclude = exclude
        self.min_ndim = min_ndim
        self.parameter = parameter

    @classmethod
    def of(
        cls,
        selection: str | ParameterSelection | None,
        default: ParameterSelection | None = None,
    ) -> ParameterSelection:
        """A selection from what a user passed: one as it is, or a regular expression on names.

        Args:
            selection: ``None`` asks for ``default``.
            default: what the technique acts on unless told otherwise. A regular expression
                narrows nothing but names, so it reaches every parameter of ``min_ndim``.
        """
        default = default if default is not None else cls()
        if selection is None:
            return default
        if isinstance(selection, ParameterSelection):
            return selection
        if not isinstance(selection, str):
            raise ArgumentError(
                cls,
                f"parameters must be a ParameterSelection or a regular expression, got "
                f"{selection!r}",
                cure='parameters="encoder.*weight"',
            )
        return cls(pattern=selection, min_ndim=default.min_ndim, parameter=None)

    def select(self, module: nn.Module, owner: object = None) -> dict[str, nn.Parameter]:
        """The chosen parameters by name, in the module's order.

        Args:
            module: where to look.
            owner: the technique that asks, for the error.

        Raises:
            ArgumentError: if nothing is chosen; the message names the candidates.
        """
        chosen = {name: weight for name, weight, _, _ in self._chosen(module)}
        self._check_found(chosen, module, owner)
        return chosen

    def select_modules(
        self, module: nn.Module, owner: object = None
    ) -> dict[str, tuple[nn.Module, str]]:
        """Like :meth:`select`, but gives the module that holds each parameter and its attribute.

        Raises:
            ArgumentError: if nothing is chosen; the message names the candidates.
        """
        chosen = {name: (holder, attribute) for name, _, holder, attribute in self._chosen(module)}
        self._check_found(chosen, module, owner)
        return chosen

    def _chosen(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module, str]]:
        seen: set[int] = set()
        for path, holder in module.named_modules():
            if not self._fits_type(holder):
                continue
            for attribute, weight in holder.named_parameters(recurse=False):
                name = f"{path}.{attribute}" if path else attribute
                if id(weight) not in seen and self._fits(name, attribute, weight):
                    seen.add(id(weight))
                    yield name, weight, holder, attribute

    def _fits_type(self, holder: nn.Module) -> bool:
        if self.types is None:
            return self.parameter is None or not _is_norm(holder)
        return any(_is_type(holder, kind) for kind in self.types)

    def _fits(self, name: str, attribute: str, weight: nn.Parameter) -> bool:
        return (
            weight.requires_grad
            and weight.ndim >= self.min_ndim
            and (self.parameter is None or attribute == self.parameter)
            and (self.pattern is None or re.search(self.pattern, name) is not None)
            and (self.exclude is None or re.search(self.exclude, name) is None)
        )

    def _check_found(self, chosen: object, module: nn.Module, owner: object) -> None:
        if chosen:
            return
        candidates = [
            f"{name} {tuple(weight.shape)}" + ("" if weight.requires_grad else " (frozen)")
            for name, weight in module.named_parameters()
        ]
        shown = ", ".join(candidates[:12]) + (" ..." if len(candidates) > 12 else "")
        raise ArgumentError(
            owner if owner is not None else self,
            f"{self!r} chooses no parameter of {type(module).__name__}, which has "
            f"{shown or 'none'}",
            cure='parameters="<a regular expression on those names>"',
        )

    def _check_expression(self, name: str, expression: str | None) -> None:
        if expression is None:
            return
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise ArgumentError(
                self,
                f"`{name}` must be a regular expression, got {expression!r} ({error})",
                cure=f'ParameterSelection({name}="encoder")',
            ) from error

    def __repr__(self) -> str:
        fields = {
            "types": self.types and [t if isinstance(t, str) else t.__name__ for t in self.types],
            "pattern": self.pattern,
            "exclude": self.exclude,
            "min_ndim": self.min_ndim,
            "parameter": self.parameter,
        }
        defaults = {"min_ndim": 2, "parameter": "weight"}
        given = [f"{k}={v!r}" for k, v in fields.items() if v != defaults.get(k)]
        return f"ParameterSelection({', '.join(given)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterSelection) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.types, self.pattern, self.exclude, self.min_ndim, self.parameter))


def _is_norm(module: nn.Module) -> bool:
    # By name, since most networks bring norms of their own; LayerNorm over an image has a weight
    # of three dimensions, which `min_ndim` does not keep out.
    return "norm" in type(module).__name__.lower()


def _is_type(module: nn.Module, kind: type[nn.Module] | str) -> bool:
    if isinstance(kind, type):
        return isinstance(module, kind)
    name = kind.rsplit(".", 1)[-1]
    return any(base.__name__ == name for base in type(module).__mro__)
