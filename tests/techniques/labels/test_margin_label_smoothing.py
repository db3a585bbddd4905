"""MbLS: values of the official code, what it leaves alone, the gap that it allows, calibration."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine import ArgumentError, ConflictError
from lightning_reg.techniques.labels.label_smoothing import LabelSmoothing
from lightning_reg.techniques.labels.margin_label_smoothing import (
    MarginLabelSmoothing,
    margin_label_smoothing,
)
from tests.engine.simple import fit

LOGITS = torch.tensor(
    [[4.0, 1.0, -0.5, -3.0], [2.5, 0.3, -2.0, -2.2], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64
)
# by-liu/MbLS@dc86503, calibrate/losses/logit_margin_l1.py, `LogitMarginL1(margin=1.0)`, the margin
# term on LOGITS.
OFFICIAL_VALUE = 1.6583333333333332
OFFICIAL_GRADIENT = [
    [0.25, -1 / 12, -1 / 12, -1 / 12],
    [0.25, -1 / 12, -1 / 12, -1 / 12],
    [0.0, 0.0, 0.0, 0.0],
]


def test_value_and_gradient_are_those_of_the_official_code():
    z = LOGITS.clone().requires_grad_()
    value = margin_label_smoothing(z, 1.0).mean()
    value.backward()
    assert float(value.detach()) == pytest.approx(OFFICIAL_VALUE, rel=1e-12)
    torch.testing.assert_close(z.grad, torch.tensor(OFFICIAL_GRADIENT, dtype=torch.float64))


def test_a_shift_of_the_logits_and_what_is_inside_the_margin_are_free():
    shifted = margin_label_smoothing(LOGITS + 7.0, 1.0)
    torch.testing.assert_close(shifted, margin_label_smoothing(LOGITS, 1.0))
    assert margin_label_smoothing(LOGITS, 7.0).abs().max() == 0


def test_a_certain_label_gets_a_gap_of_the_margin_where_its_pull_is_strong():
    # Two logits: the cross-entropy widens the gap g by 1 / (1 + e^g), the penalty narrows it by
    # alpha / 2 beyond the margin: they meet at the margin, or at log(2 / alpha - 1) beyond it.
    for alpha, margin in ((0.5, 3.0), (0.1, 1.0)):
        z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([z], 0.3)
        for _ in range(500):
            optimizer.zero_grad()
            penalty = alpha * margin_label_smoothing(z, margin).mean()
            (F.cross_entropy(z, torch.tensor([0])) + penalty).backward()
            optimizer.step()
        expected = max(margin, math.log(2 / alpha - 1))
        assert float((z[0, 0] - z[0, 1]).detach()) == pytest.approx(expected, abs=0.1)


def test_label_smoothing_beside_it_is_refused():
    with pytest.raises(ConflictError, match="soften the same labels"):
        fit([MarginLabelSmoothing(), LabelSmoothing(0.1)], max_epochs=1)


@pytest.mark.parametrize("arguments", [{"strength": -1.0}, {"margin": -1.0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="MarginLabelSmoothing"):
        MarginLabelSmoothing(**arguments)
