"""Does the technique do nothing when it is off, something when it is on, and what it says?"""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_reg.engine.errors import UnsupportedError
from lightning_reg.engine.memory import take_index
from lightning_reg.engine.regularizer import Regularizer
from lightning_reg.engine.signals import default_path, read_path, write_path
from lightning_reg.testing.case import Probe
from lightning_reg.testing.hosts import HostOptions, recorded
from lightning_reg.testing.runs import Outcome, Setting
from lightning_reg.testing.snapshot import first_difference, largest_gap
from lightning_reg.testing.subject import PLAIN, Subject

# With dropout, so that a draw from the global generator shows.
_WITH_DROPOUT = Setting(options=HostOptions(dropout=0.3))
_DOUBLE = Setting(precision="64-true")
_MANUAL = Setting(options=HostOptions(manual=True))


def neutral(subject: Subject) -> None:
    """Its neutral setting trains the same bits as a run without it."""
    setting = subject.case.neutral
    if setting is None:
        raise subject.fail(
            "the case has no `neutral` setting. Give one ({'strength': 0.0}), or declare the "
            "exemption 'neutral' with the reason why the technique cannot be turned off"
        )
    without = subject.baseline(_WITH_DROPOUT)
    turned_off = subject.outcome(_WITH_DROPOUT, setting)
    for what in ("weights", "buffers", "logits"):
        expected = _part(without, what)
        difference = first_difference(expected, _part(turned_off, what), sorted(expected))
        if difference is not None:
            raise subject.fail(
                f"with {dict(setting)} the {what} after training are not those of a run without "
                f"the technique: {difference}. A technique that is off must not touch the loss, "
                "the gradients, the batch or the global random generator"
            )


def acts(subject: Subject) -> None:
    """Its arguments change what is trained."""
    without, with_it = subject.baseline(), subject.outcome()
    parts = ("weights", "buffers", "logits") if subject.kind == "test" else ("weights", "buffers")
    for what in parts:
        expected = _part(without, what)
        if first_difference(expected, _part(with_it, what), sorted(expected)) is not None:
            return
    raise subject.fail(
        f"with {dict(subject.case.args)} every weight is the same as in a run without the "
        "technique: it does not act, or the case's settings are too weak"
    )


def formula(subject: Subject) -> None:
    """`reg/<name>` is what its function gives; callback and `self.regularize` train the same."""
    case = subject.case
    if case.expected is not None:
        _check_value(subject)
    elif subject.cls.function is None or case.gradcheck is None:
        raise subject.fail(
            "nothing says what it computes. Give the class its `function` and the case a "
            "`gradcheck` or, for a technique that logs a value, `expected`"
        )
    if subject.kind == "callback" and not subject.manual and not subject.overrides("perturb"):
        _check_manual(subject)


def gradient(subject: Subject) -> None:
    """The gradient of its function is right in float64."""
    if subject.case.gradcheck is None:
        raise subject.fail(
            "the case has no `gradcheck`. Give `lambda: (function, inputs)` with float64 inputs, "
            "or declare the exemption 'gradient' with the reason"
        )
    function, inputs = subject.case.gradcheck()
    differentiable = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not differentiable or any(t.dtype != torch.float64 for t in differentiable):
        raise subject.fail(
            "`gradcheck` needs at least one float64 input with requires_grad=True: in float32 "
            "finite differences say nothing"
        )
    try:
        torch.autograd.gradcheck(function, inputs)
    except (RuntimeError, AssertionError) as error:
        raise subject.fail(
            "the gradient that autograd gives differs from finite differences: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def logs(subject: Subject) -> None:
    """Its value is logged; the user's logged loss and metrics are those of a run without it."""
    outcome = subject.outcome()
    for key in subject.log_keys():
        if key not in outcome.metrics:
            logged = ", ".join(sorted(outcome.metrics)) or "nothing"
            raise subject.fail(
                f"`{key}` was not logged, only {logged}. If the technique has no value to show, "
                "the case says so with `logs=()`"
            )
        if not math.isfinite(outcome.metrics[key]):
            raise subject.fail(f"`{key}` is {outcome.metrics[key]}")
    if outcome.counted != PLAIN.samples:
        raise subject.fail(
            f"the host's metric counted {outcome.counted} samples of {PLAIN.samples}: a second "
            "pass must not update metrics, and a batch must keep its size"
        )
    if subject.kind == "callback" and not subject.changes_forward:
        _check_users_loss(subject)


# ---------------------------------------------------------------------- the logged value


class _Probing(Callback):
    """Copies the module and the technique in front of the first step, and runs the copy."""

    def __init__(self, technique: Regularizer | None) -> None:
        self._technique = technique
        self.probe: Probe | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In a fit."""
        self._take(pl_module, batch)

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """In a test."""
        self._take(pl_module, batch)

    def _take(self, module: pl.LightningModule, batch: Any) -> None:
        if self.probe is not None:
            return
        # Together, so that a technique which refers to the module refers to the copy.
        with torch.inference_mode(False), torch.enable_grad():
            twin, technique = copy.deepcopy((module, self._technique))
            self.probe = probe_of(twin, copy.deepcopy(batch), technique)


def probe_of(module: pl.LightningModule, batch: Any, technique: Any) -> Probe:
    """Run a module on a batch, and keep the graph."""
    sample, index = take_index(batch)
    path = default_path(sample, "inputs")
    inputs = sample if path is None and isinstance(sample, Tensor) else None
    if path is not None:
        inputs = read_path(sample, path)
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        inputs = inputs.detach().clone().requires_grad_()
        sample = inputs if path is None else write_path(sample, path, inputs)
    with recorded(module) as features:
        loss, signals = module.compute(sample)  # type: ignore[operator]
    size = len(inputs) if isinstance(inputs, Tensor) else PLAIN.batch
    return Probe(
        module=module,
        inputs=signals.get("inputs", inputs),
        targets=signals.get("targets"),
        index=torch.arange(size) if index is None else index,
        logits=signals.get("logits", loss),
        features=features,
        loss=loss,
        technique=technique,
    )


def _check_value(subject: Subject) -> None:
    technique = subject.technique()
    probing = _Probing(technique)
    limits = {"limit_train_batches": 1, "limit_test_batches": 1}
    run = subject.run(_DOUBLE, technique=technique, after=[probing], trainer=limits)
    outcome = run.go()
    key = subject.log_keys(value=True)[0]
    if key not in outcome.metrics:
        raise subject.fail(f"the case expects a value of `{key}`, which was not logged")
    assert subject.case.expected is not None
    assert probing.probe is not None
    expected = float(subject.case.expected(probing.probe))
    logged = outcome.metrics[key]
    # Log values are kept in float32.
    if not abs(logged - expected) <= 1e-5 * max(1.0, abs(expected)):
        raise subject.fail(
            f"`{key}` was {logged:.8g} after the first step, and the function gives "
            f"{expected:.8g} for the weights and the batch of that step"
        )


def _check_manual(subject: Subject) -> None:
    """The same technique through ``self.regularize``, or a refusal that names it."""
    if subject.case.host(_MANUAL.options).automatic_optimization:
        return
    run = subject.run(_MANUAL)
    try:
        manual = run.go()
    except UnsupportedError as refusal:
        if subject.name in str(refusal) and not run.module.seen:  # type: ignore[union-attr]
            return
        raise
    automatic = subject.outcome()
    worst, where = largest_gap(automatic.weights, manual.weights)
    if not worst <= subject.case.tolerance:
        raise subject.fail(
            f"`self.regularize` under manual optimization trains other weights than the callback "
            f"alone: {where} differs by {worst:.3g} of the largest weight"
        )


def _check_users_loss(subject: Subject) -> None:
    frozen = Setting(options=HostOptions(lr=0.0))
    plain, ours = subject.baseline(frozen).metrics, subject.outcome(frozen).metrics
    if "loss" in plain and plain["loss"] != ours.get("loss"):
        raise subject.fail(
            f"at learning rate 0 the user's own logged `loss` is {ours.get('loss')} and without "
            f"the technique {plain['loss']}: what a user logs must stay the clean loss"
        )


def _part(outcome: Outcome, what: str) -> dict[str, Tensor]:
    if what == "logits":
        return {f"of micro-batch {i}": logits for i, (_, logits) in enumerate(outcome.seen)}
    found: dict[str, Tensor] = getattr(outcome, what)
    return found
