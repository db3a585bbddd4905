"""AAER: the official numbers, its cases by hand, and what it shows in training."""

import pytest
import torch

from lightning_reg.techniques.gradients.aaer import AAER, aaer
from tests.engine.simple import fit

# The penalty of tmllab/2023_NeurIPS_AAER@5ad2591, CIFAR10/AAER.py, with lamda 1, 2.5 and 1.5, and
# its gradient by the logits at the end of the attack, run in float64. Four of six are abnormal.
START = (torch.arange(24, dtype=torch.float64).view(6, 4) * 0.7).sin() * 2
END = (torch.arange(24, dtype=torch.float64).view(6, 4) * 1.3).cos() * 3
TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])
OFFICIAL_VALUE = 20.09316499164232
OFFICIAL_GRADIENT = [
    [1.5000000447034836, -0.24296945154186372, -2.2707829277164837, -1.9521078811264305],
    [0.36778686775556296, 1.8156647203926788, 0.9525089316445385, -0.43912980365942295],
    [-0.21020975453326027, 0.9545806359451853, 0.7041835944428111, -1.231339925323366],
    [-2.3458654157762395, -0.8737507841839086, 1.56100788121147, 2.0734182764852642],
    [0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0],
]


def test_value_and_gradient_of_the_official_code():
    end = END.clone().requires_grad_()
    value = aaer(START, end, TARGETS)
    # The official share n/m is a float32 number.
    assert value.item() == pytest.approx(OFFICIAL_VALUE, rel=1e-7)
    (gradient,) = torch.autograd.grad(value, end)
    expected = torch.tensor(OFFICIAL_GRADIENT, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)


def two_of_four():
    """Two classes, label 0: the margin falls from 1 to 0 (normal) or rises to 3 (abnormal)."""
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4, 1)
    end = start.clone()
    end[:2, 0], end[2:, 0] = 0.0, 3.0
    return start, end, torch.zeros(4, dtype=torch.long)


def test_by_hand():
    start, end, targets = two_of_four()

    # Change 1 of normal and 4 of abnormal ones; a loss of log(1 + e^-m) at margin m.
    def loss(margin):
        return torch.tensor(-margin, dtype=torch.float64).exp().log1p()

    expected = 0.5 * (2.5 * (loss(1.0) - loss(3.0)) + 1.5 * (4.0 - 1.0))
    torch.testing.assert_close(aaer(start, end, targets), expected)


def test_it_is_zero_where_one_of_the_groups_is_empty():
    start, end, targets = two_of_four()
    assert aaer(start[:2], end[:2], targets[:2]).item() == 0
    assert aaer(start[2:], end[2:], targets[2:]).item() == 0


def test_a_smaller_change_of_abnormal_ones_is_free():
    start, end, targets = two_of_four()
    end[2:, 0] = 1.5
    assert aaer(start, end, targets, loss_weight=0.0).item() == 0


def test_the_loss_term_has_a_gradient_only_if_asked():
    start, end, targets = two_of_four()
    end.requires_grad_()
    plain = aaer(start, end, targets, logit_weight=0.0)
    (gradient,) = torch.autograd.grad(plain, end, allow_unused=True)
    assert gradient is None or not gradient.any()
    asked = aaer(start, end, targets, logit_weight=0.0, loss_gradient=True)
    (gradient,) = torch.autograd.grad(asked, end)
    # It lowers the label's logit of the abnormal ones: their loss is to come back up.
    assert (gradient[2:, 0] > 0).all()
    assert not gradient[:2].any()


def test_the_share_of_abnormal_examples_is_logged():
    # After 40 epochs at this radius one step overshoots for some samples.
    _, run = fit([AAER(0.0, epsilon=1.0)], max_epochs=40, log_every_n_steps=4)
    assert 0.05 < run.callback_metrics["reg/aaer_abnormal_share"].item() < 0.95
    _, run = fit([AAER(epsilon=1e-3, random_start=0.0)])
    assert run.callback_metrics["reg/aaer_abnormal_share"].item() == 0
    assert run.callback_metrics["reg/aaer"].item() == 0
