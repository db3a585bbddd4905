"""Label smoothing, and the penalty that smooths where a prediction is too sure."""

import torch

from lightning_reg.techniques.labels.acls import acls
from lightning_reg.techniques.labels.label_smoothing import label_smoothing
from lightning_reg.testing import ContractCase, Probe

_ROWS = torch.tensor([[4.0, 1.0, -0.5, -3.0], [2.5, 0.3, -2.0, -2.2]], dtype=torch.float64)


def _label_smoothing():
    return lambda q: label_smoothing(q, 0.3), (_ROWS.softmax(1).requires_grad_(),)


def _acls():
    """References take no gradient, so they are held fixed: the largest and the least logit."""

    def function(largest, middle):
        first = torch.cat([largest, _ROWS[:, 1:]], 1)
        second = torch.cat([_ROWS[:, :1], middle, _ROWS[:, 3:]], 1)
        return acls(first, 1.0, 1.0, 0.0) + acls(second, 1.0, 0.0, 0.4)

    parts = (_ROWS[:, :1], _ROWS[:, 1:3])
    return function, tuple(part.clone().requires_grad_() for part in parts)


def _expected_acls(probe: Probe) -> torch.Tensor:
    return acls(probe.logits, 0.2).mean()


CASES = {
    "LabelSmoothing": ContractCase(
        args={"smoothing": 0.3},
        neutral={"smoothing": 0.0},
        bad=[{"smoothing": -0.1}, {"smoothing": 1.1}, {"replaces": "all"}],
        gradcheck=_label_smoothing,
    ),
    "ACLS": ContractCase(
        args={"strength": 1.0, "margin": 0.2},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"margin": -1.0}, {"positive": -1.0}, {"reference": "mean"}],
        gradcheck=_acls,
        expected=_expected_acls,
    ),
}
