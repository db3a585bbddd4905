"""Techniques that pull outputs to those of an earlier self."""

import copy

import torch
from lightning.pytorch.callbacks import Callback

from lightning_reg.techniques.continual.previous_task_distillation import (
    PreviousTaskDistillation,
    prediction_distillation,
)
from lightning_reg.testing import ContractCase


class EarlierTask(Callback):
    """Gives the technique a reference: a first task has none, and a check trains one."""

    def setup(self, trainer, pl_module, stage):
        for callback in trainer.callbacks:
            if isinstance(callback, PreviousTaskDistillation):
                earlier = {k: _earlier(v) for k, v in pl_module.state_dict().items()}
                state = {"teacher": earlier, "taken_at": 0, "references_taken": 1}
                callback.load_state_dict(state)


def _earlier(weight):
    shift = torch.arange(weight.numel()).view(weight.shape).sin()
    return weight + 0.3 * shift if weight.is_floating_point() else weight.clone()


def _companions():
    return [EarlierTask()]


def _expected(probe):
    earlier = copy.deepcopy(probe.module)
    weights = {k: _earlier(v) for k, v in earlier.state_dict().items()}
    earlier.load_state_dict(weights)
    then = earlier.eval()(probe.inputs)[:, :3]
    p = (then / 2).softmax(1)
    return (p * (p.log() - (probe.logits[:, :3] / 2).log_softmax(1))).sum(1).mean()


def _gradcheck():
    generator = torch.Generator().manual_seed(0)
    now, then = (torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    return prediction_distillation, (now.requires_grad_(), then, 1.7)


CASES = {
    "PreviousTaskDistillation": ContractCase(
        args={"strength": 2.0, "classes": 3},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"target": "weights"},
            {"target": "features"},
            {"layer": "encoder"},
            {"temperature": 0.0},
            {"form": "linear"},
            {"classes": 0},
            {"classes": [1, 1]},
            {"ignore_index": 0.5},
        ],
        bad_late=[{"target": "features", "layer": "no_such_layer"}],
        companions=_companions,
        expected=_expected,
        gradcheck=_gradcheck,
    ),
}
