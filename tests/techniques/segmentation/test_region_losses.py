"""Dice, Tversky and self-adjusting Dice: official values, closed forms, and rare classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import fbeta_score, jaccard_score

from lightning_reg.functional import self_adjusting_dice_loss, soft_dice_loss, tversky_loss
from tests.techniques.reweighting.rare import rare_f1


def fixed(*shape):
    """Numbers that need no generator."""
    return (torch.arange(math.prod(shape), dtype=torch.float64).view(shape) * 1.7).sin() * 3


def value_and_gradient(loss, z):
    z = z.clone().requires_grad_()
    value = loss(z)
    return value.item(), torch.autograd.grad(value, z)[0]


def interval(start, length, cells=400):
    """The share of each cell of width 0.1 that an interval covers, (cells, 1)."""
    left = torch.arange(cells, dtype=torch.float64) * 0.1
    covered = torch.minimum(left + 0.1, torch.tensor(start + length)) - left.clamp_min(start)
    return (covered.clamp_min(0) / 0.1).unsqueeze(1)


def test_dice_has_the_official_value_and_gradient():
    # abhi1kumar/SeaBird@e26e83e, PanopticBEV/panoptic_bev/algos/semantic_seg.py, dice_loss.
    z, y = fixed(2, 2, 2, 3), (fixed(2, 2, 2, 3) * 1.3 + 0.2 > 1).double().roll(1, -1)

    def rows(t):
        return t.movedim(1, -1).flatten(0, -2)

    value, gradient = value_and_gradient(
        lambda z: soft_dice_loss(rows(z.sigmoid()), rows(y)).mean(), z
    )
    assert value == pytest.approx(0.6180822253227234, rel=1e-7)  # in float32
    official = [0.0043163443, 0.0007978248, -0.0119460051, -0.0030405327]
    assert gradient.flatten()[:4].tolist() == pytest.approx(official, abs=1e-9)


@pytest.mark.parametrize(("length", "offset"), [(4.0, 0.5), (10.0, 0.5), (10.0, 2.0), (2.0, 3.0)])
def test_dice_of_a_shifted_segment_is_its_relative_offset(length, offset):
    loss = soft_dice_loss(interval(5.0 + offset, length), interval(5.0, length), smooth=1e-9)
    assert loss.item() == pytest.approx(min(offset / length, 1.0), abs=1e-6)


def test_squares_take_mass_off_unsure_predictions():
    p, y = torch.full((4, 1), 0.5).double(), torch.tensor([[1.0], [1], [0], [0]]).double()
    assert soft_dice_loss(p, y, 1e-9).item() == pytest.approx(1 - 2 / 4)
    assert soft_dice_loss(p, y, 1e-9, squared=True).item() == pytest.approx(1 - 2 / 3)


def test_a_class_that_is_neither_there_nor_predicted_costs_nothing():
    nothing = torch.zeros(5, 2)
    assert soft_dice_loss(nothing, nothing).tolist() == [0, 0]
    assert tversky_loss(nothing, nothing).tolist() == [0, 0]


def test_tversky_with_equal_prices_is_dice():
    p, y = fixed(9, 2).sigmoid(), (fixed(9, 2).roll(1, 0) > 0).double()
    torch.testing.assert_close(tversky_loss(p, y, 0.5, 0.5, 0.7), soft_dice_loss(p, y, 1.4))


def test_tversky_of_decisions_is_a_known_score():
    p, y = (fixed(40) > 0.5).double(), (fixed(40) + fixed(80)[40:] > 0).double()
    hits, chosen, true = (p * y).sum(), p.sum(), y.sum()
    assert 0 < hits < min(chosen, true)
    assert chosen != true

    def loss(alpha, beta):
        return tversky_loss(p[:, None], y[:, None], alpha, beta, 1e-12).item()

    assert loss(1.0, 1.0) == pytest.approx(1 - jaccard_score(y, p), abs=1e-9)
    # F_2: beta / alpha is 4, and they sum to 1.
    assert loss(0.2, 0.8) == pytest.approx(1 - fbeta_score(y, p, beta=2), abs=1e-9)


@pytest.mark.parametrize(
    ("squared", "value", "gradient"),
    [
        (False, 0.4561010728924164, [0.0152883346, 0.0261867657, 0.0178799330]),
        (True, 0.2811929865568866, [0.0216889930, 0.0344158086, 0.0176692092]),
    ],
)
def test_self_adjusting_dice_has_the_official_binary_values(squared, value, gradient):
    # ShannonAI/dice_loss_for_NLP@d437bb9, loss/dice_loss.py, smooth 1, alpha 0.3.
    from lightning_reg.techniques.segmentation.self_adjusting_dice_loss import _loss, _terms

    y = torch.tensor([0, 1, 0, 0, 1, 0]).double()

    def loss(z):
        return _loss(*(part.sum() for part in _terms(z.sigmoid(), y, 0.3, squared)), 1.0)

    found, slope = value_and_gradient(loss, fixed(6))
    assert found == pytest.approx(value, rel=1e-6)
    assert slope[:3].tolist() == pytest.approx(gradient, abs=1e-8)


def test_self_adjusting_dice_has_the_official_values_of_several_classes():
    # As above with square_denominator=True; that sums over the 3 classes.
    y = F.one_hot(torch.tensor([0, 2, 1, 1]), 3).double()
    value, gradient = value_and_gradient(
        lambda z: 3 * self_adjusting_dice_loss(z.softmax(1), y, 0.3, 1.0, True).mean(), fixed(4, 3)
    )
    assert value == pytest.approx(0.5144081794797887, rel=1e-6)
    official = [-0.0016332127, -0.0030589820, 0.0046921947]
    assert gradient[0].tolist() == pytest.approx(official, abs=1e-8)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_a_positive_is_least_below_certainty(alpha):
    p = torch.linspace(0.001, 0.999, 4991, dtype=torch.float64).unsqueeze(1)
    losses = self_adjusting_dice_loss(p, torch.ones_like(p), alpha)
    assert p[losses.argmin()].item() == pytest.approx(1 / (1 + alpha), abs=1e-3)


def test_without_the_exponent_it_is_the_dice_loss_of_each_element():
    p, y = fixed(6, 1).sigmoid(), (fixed(6, 1) > 0).double()
    each = torch.stack([soft_dice_loss(a[None], b[None]) for a, b in zip(p, y, strict=True)])
    torch.testing.assert_close(self_adjusting_dice_loss(p, y, 0.0), each)


def test_a_prediction_of_one_has_a_finite_gradient():
    z = torch.tensor([[200.0], [-200.0]]).requires_grad_()
    y = torch.tensor([[1.0], [0.0]])
    self_adjusting_dice_loss(z.sigmoid(), y, 0.3).sum().backward()
    assert z.grad.isfinite().all()


def test_sums_find_a_rare_class_and_the_mean_of_positions_does_not():
    # F1 of three seeds, sums: 0.40, 0.35, 0.40; cross-entropy: 0.28, 0.26, 0.27; positions: 0.
    def by_sums(z, y):
        return soft_dice_loss(z.sigmoid()[:, None], y[:, None]).sum()

    def by_position(z, y):
        return self_adjusting_dice_loss(z.sigmoid()[:, None], y[:, None]).mean()

    for seed in range(3):
        plain = rare_f1(F.binary_cross_entropy_with_logits, seed)
        assert rare_f1(by_sums, seed) > plain + 0.05
        assert rare_f1(by_position, seed) < 0.05
