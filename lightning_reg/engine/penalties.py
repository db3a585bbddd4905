"""Phase 4 of all techniques, whose numbers from other ranks come by one collective."""

from __future__ import annotations

from collections.abc import Sequence
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
    penalties that are no means over samples.

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
    parts = [value for _, value in asked if isinstance(value, JointMean)]
    waiting = log.waiting(step.device) if log is not None and logging else []
    means = step.comm.means([*parts, *(_one_each(value) for value in waiting)])
    if log is not None and logging:
        log.arrived(means[len(parts) :])
    joint = iter(means[: len(parts)])
    found: list[tuple[Regularizer, Tensor]] = []
    for technique, value in asked:
        if isinstance(value, JointMean):
            value = next(joint)
            if logging:
                step.log(technique, value.detach(), joint=True)
        if value is not None:
            found.append((technique, value))
    return found


def _one_each(value: Tensor) -> JointMean:
    """A number of which every rank has one."""
    return JointMean(value, torch.ones_like(value))


__all__ = ["penalties"]
