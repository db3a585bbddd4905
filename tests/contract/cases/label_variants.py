"""Label smoothing by a margin, and by what the model says."""

import torch
from lightning.pytorch.callbacks import Callback

from lightning_reg.techniques.labels.margin_label_smoothing import margin_label_smoothing
from lightning_reg.techniques.labels.online_label_smoothing import (
    OnlineLabelSmoothing,
    online_label_smoothing,
)
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import CLASSES

_ROWS = torch.tensor([[4.0, 1.0, -0.5, -3.0], [2.5, 0.3, -2.0, -2.2]], dtype=torch.float64)


def _table():
    return torch.arange(float(CLASSES**2)).view(CLASSES, CLASSES).sin().softmax(1)


class PastEpoch(Callback):
    """Soft labels: the first epoch of a run has none, and a check trains one."""

    def setup(self, trainer, pl_module, stage):
        for callback in trainer.callbacks:
            if isinstance(callback, OnlineLabelSmoothing):
                callback.load_state_dict({"table": _table(), "sums": torch.empty(0)})


def _companions():
    return [PastEpoch()]


def _left_on_the_label(probe):
    return _table()[probe.targets, probe.targets].mean()


def _smoothed():
    labels = _ROWS.softmax(1).requires_grad_()
    return lambda q: online_label_smoothing(q, _table(), 0.4), (labels,)


CASES = {
    "MarginLabelSmoothing": ContractCase(
        args={"strength": 1.0, "margin": 0.2},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"margin": -1.0}],
        expected=lambda probe: margin_label_smoothing(probe.logits, 0.2).mean(),
        gradcheck=lambda: (
            lambda z: margin_label_smoothing(z, 1.0),
            (_ROWS.clone().requires_grad_(),),
        ),
    ),
    "OnlineLabelSmoothing": ContractCase(
        args={"strength": 0.6},
        neutral={"strength": 0.0},
        bad=[{"strength": 1.1}, {"strength": -0.1}, {"replaces": "all"}],
        companions=_companions,
        expected=_left_on_the_label,
        gradcheck=_smoothed,
        logs=("reg/online_label_smoothing",),
    ),
}
