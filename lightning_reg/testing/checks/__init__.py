"""The promises of the contract, by name."""

from __future__ import annotations

from lightning_reg.testing.checks.check import Check
from lightning_reg.testing.checks.copies import copies, yaml
from lightning_reg.testing.checks.effect import acts, formula, gradient, logs, neutral
from lightning_reg.testing.checks.lifecycle import order, restores
from lightning_reg.testing.checks.refusals import (
    arguments,
    missing_signals,
    non_finite,
    signals,
)
from lightning_reg.testing.checks.resume import resume
from lightning_reg.testing.checks.scale import accumulation, precision, replicas, semantics
from lightning_reg.testing.subject import Subject


def _of_a_fit(subject: Subject) -> str | None:
    return "it acts in `trainer.test`" if subject.kind == "test" else None


def _of_a_callback(subject: Subject) -> str | None:
    return "it is part of the module, not of the callbacks" if subject.kind == "mixin" else None


def _of_an_order(subject: Subject) -> str | None:
    return _of_a_callback(subject) or _of_a_fit(subject)


def _of_joint_batches(subject: Subject) -> str | None:
    if subject.case.joint is not None:
        return None
    if subject.cls.semantics == "local":
        return "it is declared 'local': defined per rank, so no joint batch is claimed"
    return _of_a_fit(subject)


def _of_automatic_optimization(subject: Subject) -> str | None:
    if subject.manual:
        return "the Trainer does not accumulate for a module that optimizes manually"
    return _of_a_fit(subject)


def _of_signals(subject: Subject) -> str | None:
    if subject.manual or not missing_signals(subject):
        return "its host has no variant without one of the signals that it needs"
    return None


CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check("neutral", neutral),
        Check("acts", acts),
        Check("formula", formula),
        Check("gradient", gradient),
        Check("replicas", replicas),
        Check("semantics", semantics, _of_joint_batches),
        Check("accumulation", accumulation, _of_automatic_optimization),
        Check("resume", resume, _of_a_fit),
        Check("precision", precision),
        Check("order", order, _of_an_order),
        Check("restores", restores),
        Check("copies", copies),
        Check("yaml", yaml, _of_a_callback),
        Check("arguments", arguments),
        Check("signals", signals, _of_signals),
        Check("non_finite", non_finite),
        Check("logs", logs),
    )
}

__all__ = ["CHECKS", "Check"]
