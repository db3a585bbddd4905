"""Replaces a method on one instance so that Lightning, deepcopy and pickle see no difference."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

_ABSENT = object()


class MethodPatch:
    """Routes ``instance.<name>`` through ``run`` until :meth:`undo`.

    Lightning reads ``__code__`` and the signature of a step, so the replacement is a bound method
    whose function carries the user's signature. A copy of the instance (a teacher, a process
    that is spawned) gets the user's own method back.

    Args:
        instance: the object whose method is replaced.
        name: the method's name.
        run: called with the original method and the arguments.
        transparent: let Lightning see the original's signature; ``False`` makes it see an
            override even where the original is Lightning's own empty hook.
    """

    def __init__(
        self,
        instance: Any,
        name: str,
        run: Callable[..., Any],
        transparent: bool = True,
    ) -> None:
        self.instance = instance
        self.name = name
        self._run = run
        # torch.compile leaves its own method in the instance: that is what has to come back.
        self._shadowed = instance.__dict__.get(name, _ABSENT)
        self.original = getattr(instance, name)
        function = _redirect(name)
        if transparent:
            _pose_as(function, self.original)
        self.method = types.MethodType(function, self)
        instance.__dict__[name] = self.method

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the replaced method does."""
        return self._run(self.original, *args, **kwargs)

    def undo(self) -> None:
        """Put back what was there; leaves alone what somebody else has put over it since."""
        if self.instance.__dict__.get(self.name) is not self.method:
            return
        if self._shadowed is _ABSENT:
            del self.instance.__dict__[self.name]
        else:
            self.instance.__dict__[self.name] = self._shadowed

    def __getattr__(self, name: str) -> Any:
        # Pickle looks a bound method up by its name on the object it is bound to.
        if name == self.__dict__.get("name"):
            return self.__dict__["method"]
        raise AttributeError(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Original:
        shadowed = self._shadowed
        kept = None if shadowed is _ABSENT else copy.deepcopy(shadowed, memo)
        return _Original(copy.deepcopy(self.instance, memo), self.name, kept)

    def __reduce__(self) -> tuple[Any, ...]:
        shadowed = None if self._shadowed is _ABSENT else self._shadowed
        return (_Original, (self.instance, self.name, shadowed))


class _Original:
    """Stands for the patch in a copy: calls the copy's own method."""

    def __init__(self, instance: Any, name: str, shadowed: Any) -> None:
        self._instance = instance
        self._name = name
        self._shadowed = shadowed

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._shadowed is not None:
            return self._shadowed(*args, **kwargs)
        return getattr(type(self._instance), self._name)(self._instance, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == self.__dict__.get("_name"):
            return types.MethodType(_redirect(name), self)
        raise AttributeError(name)


def _redirect(name: str) -> Callable[..., Any]:
    """A fresh function, since each carries the signature of one original."""

    def redirect(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.call(args, kwargs)

    redirect.__name__ = name
    redirect.__qualname__ = name
    return redirect


def _pose_as(function: Callable[..., Any], original: Callable[..., Any]) -> None:
    inner = inspect.unwrap(original)
    if inspect.ismethod(inner):
        # The plain function, with `self` first: the patched method is bound as well.
        function.__wrapped__ = inner.__func__  # type: ignore[attr-defined]
        return
    signature = inspect.signature(inner)
    owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [owner, *signature.parameters.values()]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
