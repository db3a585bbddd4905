"""A second pass through the user's training step that leaves no trace but its loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_reg.engine.random import restore_rng_state, rng_state

if TYPE_CHECKING:
    from lightning_reg.engine.step import Step

_SILENT = ("log", "log_dict")


@contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Silence logs; let metrics and buffers be as they were before.

    Autocast keeps half-precision copies of weights, which are stale once weights moved.
    """
    torch.clear_autocast_cache()
    with ExitStack() as stack:
        stack.enter_context(_silent_log(module))
        stack.enter_context(_spare_buffers(module))
        stack.enter_context(_spare_metrics(module))
        yield


@contextmanager
def second_pass(step: Step) -> Iterator[None]:
    """Put back what a step had found in the pass before."""
    kept = step.outputs, step.loss, step.records, step.target_distribution, step.is_rerun
    step.is_rerun = True
    try:
        yield
    finally:
        step.outputs, step.loss, step.records, step.target_distribution, step.is_rerun = kept


@contextmanager
def replayed_rng(state: Any, devices: list[torch.device]) -> Iterator[None]:
    """Draw from ``state``, then go on as if nothing had been drawn."""
    now = rng_state(devices)
    restore_rng_state(state)
    try:
        yield
    finally:
        restore_rng_state(now)


@contextmanager
def _silent_log(module: nn.Module) -> Iterator[None]:
    kept = {name: module.__dict__[name] for name in _SILENT if name in module.__dict__}
    for name in _SILENT:
        module.__dict__[name] = _no_log
    try:
        yield
    finally:
        for name in _SILENT:
            del module.__dict__[name]
        module.__dict__.update(kept)


def _no_log(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``self.log``."""


@contextmanager
def _spare_buffers(module: nn.Module) -> Iterator[None]:
    # The buffers are exchanged, not written back: the first pass's graph may hold them, and an
    # in-place restore would count as a change to what its backward needs.
    owners = [m for m in module.modules() if m._buffers]
    kept = [dict(owner._buffers) for owner in owners]
    try:
        for owner in owners:
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = buffer.clone()
        yield
    finally:
        for owner, buffers in zip(owners, kept, strict=True):
            owner._buffers.clear()
            owner._buffers.update(buffers)


@contextmanager
def _spare_metrics(module: nn.Module) -> Iterator[None]:
    metrics = [m for m in module.modules() if _is_metric(m)]
    kept = [dict(metric.__dict__) for metric in metrics]
    try:
        for metric in metrics:
            for name in metric.__dict__["_defaults"]:
                metric.__dict__[name] = _copy_state(metric.__dict__[name])
        yield
    finally:
        for metric, attributes in zip(metrics, kept, strict=True):
            metric.__dict__.clear()
            metric.__dict__.update(attributes)


def _is_metric(module: nn.Module) -> bool:
    # By behaviour: torchmetrics may be imported under another root in old installations.
    return hasattr(module, "_defaults") and hasattr(module, "_update_count")


def _copy_state(state: Any) -> Any:
    return state.clone() if isinstance(state, Tensor) else list(state)
