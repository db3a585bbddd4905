"""Phase 4 of all techniques, whose means over ranks go by one collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_reg.engine.communicator import JointMean

if TYPE_CHECKING:
    from lightning_reg.engine.regularizer import Regularizer
    from lightning_reg.engine.step import Step


def penalties(step: Step, techniques: Sequence[Regularizer]) -> list[tuple[Regularizer, Tensor]]:
    """The values of the techniques that have one now, in their order."""
    asked = [(technique, technique.penalty(step.asked_by(technique))) for technique in techniques]
    means = iter(step.comm.means([value for _, value in asked if isinstance(value, JointMean)]))
    found = [
        (technique, next(means) if isinstance(value, JointMean) else value)
        for technique, value in asked
    ]
    return [(technique, value) for technique, value in found if value is not None]


__all__ = ["penalties"]
