"""Phase 4 of all techniques, whose numbers from other ranks come by one collective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_reg.engine.communicator import JointMean
from lightning_reg.engine.value_log import ValueLog

if TYPE_CHECKING:
    from lightning_reg.engine.regularizer import Regularizer
    from lightning_reg.engine.step import Step


def penalties(
    step: Step, techniques: Sequence[Regularizer], log: ValueLog | None = None
) -> list[tuple[Regularizer, Tensor]]:
    """The values of the techniques that have one now, in their order.

    The collective also carries what this rank has to log so far: values of earlier phases, and
    penalties that are no means over samples. A second pass knows the numbers of samples from the
    first and makes none, if they are facts of the batch (:attr:`JointMean.fixed`); the values are
    then this rank's.

    Args:
        step: the micro-batch.
        techniques: who is asked.
        log: where the values go; without one nothing is logged.
    """
    asked = [(technique, technique.penalty(step.asked_by(technique))) for technique in techniques]
    logging = log is not None and step.logging and not step.is_rerun
    for technique, value in asked if logging else ():
        if isinstance(value, Tensor):
            step.log(technique, value.detach())
    parts = {t.name: value for t, value in asked if isinstance(value, JointMean)}
    if step.is_rerun and _known(step, parts):
        counts = [step.joint_counts[name] for name in parts]
        means = step.comm.shares(list(parts.values()), counts)
    else:
        waiting = log.waiting(step.device) if log is not None and logging else []
        one_each = [JointMean(value, torch.ones_like(value)) for value in waiting]
        means, counts = step.comm.means_and_counts([*parts.values(), *one_each])
        if log is not None and logging:
            log.arrived(means[len(parts) :])
        if not step.is_rerun:
            step.joint_counts = dict(zip(parts, counts, strict=False))
    joint = iter(means)
    found: list[tuple[Regularizer, Tensor]] = []
    for technique, value in asked:
        if isinstance(value, JointMean):
            value = next(joint)
            if logging:
                step.log(technique, value.detach(), joint=True)
        if value is not None:
            found.append((technique, value))
    return found


def _known(step: Step, parts: Mapping[str, JointMean]) -> bool:
    """Whether the first pass has told how many samples each of these means is over."""
    return all(part.fixed and name in step.joint_counts for name, part in parts.items())


__all__ = ["penalties"]
