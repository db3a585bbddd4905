"""Margin control: the official numbers, the range, and confidence that it holds back."""

import math

import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.outputs.margin_control import MarginControl, margin_control
from tests.engine.simple import INPUTS, Host, fit

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.3, -3.0, 4.0]], dtype=torch.float64)


def test_equals_the_official_code():
    # Zeng-Shuang/FedLD@9440494, methods/fedld.py: MarginalLogLoss(1.0) less the cross-entropy.
    z = LOGITS.clone().requires_grad_()
    value = margin_control(z)
    assert value.item() == pytest.approx(0.9557562218077309, rel=1e-12)
    official = [
        [0.0822728518825207, -0.018357554616414893, -0.06391529726610583],
        [-0.01718698986608323, -0.000649784842632839, 0.017836774708715974],
    ]
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(gradient, torch.tensor(official, dtype=torch.float64))


def test_value_lies_between_that_of_uniform_and_of_sure_predictions():
    assert margin_control(torch.zeros(6, 4)).item() == pytest.approx(math.log(1 + 6 / 4))
    assert margin_control(100 * torch.eye(4)).item() == pytest.approx(math.log(1 + 4))


def test_training_ends_with_smaller_margins():
    def margin(callbacks):
        module, _ = fit(callbacks, module=Host(), max_epochs=15)
        with torch.no_grad():
            top = module(INPUTS).softmax(1).topk(2).values
        return float((top[:, 0] - top[:, 1]).mean())

    free, held = margin([]), margin([MarginControl(1.0)])
    assert held < 0.85 * free


def test_ignored_positions_do_not_count():
    labels = torch.tensor([0, -100])
    rows = MarginControl()._rows(LOGITS, labels)
    assert margin_control(rows) == margin_control(LOGITS[:1])


def test_negative_strength_is_refused():
    with pytest.raises(ArgumentError, match="MarginControl"):
        MarginControl(-0.1)
