"""Takes hooks that do nothing out of the Trainer's way."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_reg.engine.regularizer import Regularizer

# Those that a Trainer calls in every training step.
_BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
# Those through which one technique drives the pipeline for all.
_DRIVING = (
    "on_train_batch_start",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def mute_idle_hooks(techniques: Iterable[Regularizer], leader: Regularizer) -> None:
    """Hide inherited batch hooks, since entering one costs the Trainer more than what it does.

    The Trainer passes over a hook that is not callable. Hooks that a class or a user defines are
    left alone.
    """
    for technique in techniques:
        for hook in _BATCH_HOOKS:
            inherited = getattr(type(technique), hook) is getattr(Regularizer, hook)
            driving = technique is leader and hook in _DRIVING
            if inherited and not driving and hook not in vars(technique):
                vars(technique)[hook] = None


def unmute_hooks(techniques: Iterable[Regularizer]) -> None:
    """Show the hooks again."""
    for technique in techniques:
        for hook in _BATCH_HOOKS:
            if vars(technique).get(hook, technique) is None:
                del vars(technique)[hook]
