"""Keeps what submodules returned while the user's training step runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

FORWARD = ""


class Capture:
    """Forward hooks that record only while a training step of the user is running.

    Under DDP the module's own hooks fire around ``training_step`` too, since Lightning redirects
    it through ``DDP.forward``; and validation, teachers and sanity checks call the same
    submodules. None of these must be taken for the outputs of the step.
    """

    def __init__(self) -> None:
        self._records: dict[str, list[Any]] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, module: nn.Module, layers: Iterable[str]) -> None:
        """Watch the module itself, its direct children, and ``layers``."""
        names = {FORWARD, *(name for name, _ in module.named_children()), *layers}
        for name in sorted(names):
            target = module.get_submodule(name)
            self._handles.append(target.register_forward_hook(_Record(self, name)))

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._records = None

    @contextmanager
    def recording(self) -> Iterator[dict[str, list[Any]]]:
        """Record calls into the dict that is yielded: layer name to the outputs of its calls."""
        outer, self._records = self._records, {}
        try:
            yield self._records
        finally:
            self._records = outer

    def now(self) -> dict[str, list[Any]]:
        """What has been recorded so far in the step that is running."""
        return self._records or {}

    def record(self, name: str, output: Any) -> None:
        """Keep the output of one call, if a step is running."""
        if self._records is not None:
            self._records.setdefault(name, []).append(output)


class _Record:
    """A forward hook that survives the deepcopy and the pickling of its module, as a no-op."""

    def __init__(self, capture: Capture | None, name: str) -> None:
        self._capture = capture
        self._name = name

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._capture is not None:
            self._capture.record(self._name, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Record:
        return _Record(None, self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Record, (None, self._name))
