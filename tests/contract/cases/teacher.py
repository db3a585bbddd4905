"""Techniques with a teacher."""

import torch
from lightning.pytorch.callbacks import Callback

from lightning_reg.techniques.distillation.progressive_self_distillation import (
    ProgressiveSelfDistillation,
    progressive_self_distillation,
)
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import CLASSES, SAMPLES


class PastEpoch(Callback):
    """Gives the technique a past: the first epoch of a run has none, and a check trains one."""

    def setup(self, trainer, pl_module, stage):
        for callback in trainer.callbacks:
            if isinstance(callback, ProgressiveSelfDistillation):
                table = torch.arange(float(SAMPLES * CLASSES)).view(SAMPLES, CLASSES).sin()
                seen = torch.ones(SAMPLES, dtype=torch.bool)
                state = {"table": table.softmax(1), "seen": seen}
                callback.load_state_dict({"memory": state, "teacher": {}, "taken_at": 0})


def _expected(probe):
    table = torch.arange(float(SAMPLES * CLASSES)).view(SAMPLES, CLASSES).sin().softmax(1)
    return table[probe.index, probe.targets].mean()


def _function():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(5, 4, dtype=torch.float64, generator=generator).softmax(1)
    past = torch.randn(5, 4, dtype=torch.float64, generator=generator).softmax(1)
    return progressive_self_distillation, (targets.requires_grad_(), past, 0.3)


def _companions():
    return [PastEpoch()]


CASES = {
    "ProgressiveSelfDistillation": ContractCase(
        args={"strength": 0.8},
        neutral={"strength": 0.0},
        bad=[
            {"strength": 1.1},
            {"memory": "weights"},
            {"epochs": 0},
            {"num_classes": 0},
            {"replaces": "all"},
        ],
        companions=_companions,
        expected=_expected,
        gradcheck=_function,
        logs=("reg/progressive_self_distillation",),
    ),
}
