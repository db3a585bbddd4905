"""Does the technique mind its place in the list, and leave the module as it found it?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_reg.testing.companions import ReferenceGradientEdit, ReferencePenalty
from lightning_reg.testing.hosts import HostFailure, HostOptions
from lightning_reg.testing.runs import Run, Setting
from lightning_reg.testing.snapshot import (
    changed,
    effective_weights,
    first_difference,
    snapshot,
)
from lightning_reg.testing.subject import PLAIN, Subject

_FAILING_STEP = 1


def order(subject: Subject) -> None:
    """Any order of the callbacks list trains the same bits."""
    first = subject.run(after=[_penalty(), _edit()]).go()
    last = subject.run(before=[_edit(), _penalty()]).go()
    middle = subject.run(before=[_penalty()], after=[_edit()]).go()
    for other in (last, middle):
        difference = first_difference(first.weights, other.weights)
        if difference is not None:
            raise subject.fail(
                "the weights depend on its place in `callbacks` beside a penalty and a gradient "
                f"edit: {difference}. Act in the engine's phases, not in Lightning's hooks"
            )


def restores(subject: Subject) -> None:
    """After a fit, a second fit and an exception the module is what it was; runs repeat."""
    run = subject.run()
    before = snapshot(run.module)
    ours = run.go()
    usual = _usual_changes(subject, PLAIN)
    _check_untouched(subject, usual, before, run.module, "a run")
    if run.technique is not None and getattr(run.technique, "pipeline", None) is not None:
        raise subject.fail("after a run it still holds the run's pipeline: call super().teardown")
    subject.run(module=run.module, technique=run.technique).go()
    _check_untouched(subject, usual, before, run.module, "a second run with the same objects")
    repeated = first_difference(ours.weights, subject.run().go().weights)
    if repeated is not None:
        raise subject.fail(
            f"two equal runs train different weights: {repeated}. Draw from `step.rng(self)`, "
            "and keep no state in the class"
        )
    for fail_call in (0, 1) if subject.kind != "test" else (0,):
        _check_failure(subject, fail_call)


def _penalty() -> ReferencePenalty:
    return ReferencePenalty(name="beside_penalty")


def _edit() -> ReferenceGradientEdit:
    return ReferenceGradientEdit(name="beside_edit")


class _WeightsAfter(Callback):
    """Keeps what the layers compute with after each batch.

    Args:
        names: the weights.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Behind all techniques."""
        self.weights = effective_weights(pl_module, self.names)


def _usual_changes(subject: Subject, setting: Setting) -> set[str]:
    """What a run without the technique changes in a module: Lightning's own attributes."""
    run = subject.bare(setting)
    before = snapshot(run.module)
    with suppress(HostFailure):
        run.go()
    return set(changed(before, snapshot(run.module)))


def _check_untouched(
    subject: Subject,
    usual: set[str],
    before: Mapping[str, Any],
    module: nn.Module,
    occasion: str,
) -> None:
    unusual = {k: v for k, v in changed(before, snapshot(module)).items() if k not in usual}
    for key, what in unusual.items():
        raise subject.fail(
            f"after {occasion} `{key}` of the module {what}. What a technique changes it also "
            "undoes, in `on_fit_close`"
        )


def _check_failure(subject: Subject, fail_call: int) -> None:
    """Raise in the first or the second pass of a step; weights and module have to come back."""
    failing = HostOptions(fail_at=_FAILING_STEP)
    usual = _usual_changes(subject, Setting(options=failing))
    options = HostOptions(fail_at=_FAILING_STEP, fail_call=fail_call)
    module = subject.module(options)
    watching = _WeightsAfter([name for name, _ in module.named_parameters()])
    before = snapshot(module)
    run: Run = subject.run(Setting(options=options), module=module, after=[watching])
    try:
        run.go()
    except HostFailure:
        pass
    else:
        if fail_call == 0 and hasattr(module, "seen"):
            raise subject.fail(
                f"`training_step` raised in step {_FAILING_STEP} and the run went on: the "
                "technique swallows the user's exceptions"
            )
        return
    where = "an exception in training_step" if fail_call == 0 else "an exception in a second pass"
    _check_untouched(subject, usual, before, module, where)
    if subject.kind == "test":
        return
    now = {name: parameter.detach() for name, parameter in module.named_parameters()}
    difference = first_difference(watching.weights, now, watching.names)
    if difference is not None:
        raise subject.fail(
            f"after {where} the weights are not those of the last step: {difference}. Weights "
            "that are changed for a time are written back in `on_fit_close`"
        )
