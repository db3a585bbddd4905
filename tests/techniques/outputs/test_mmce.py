"""MMCE: the formula pair by pair, the released code's values, what is 0, and overconfidence."""

import math

import numpy as np
import pytest
import torch

from lightning_reg.mechanisms.labeled_output_penalty import confidence_and_correctness
from lightning_reg.techniques.outputs.mmce import MMCE, mmce
from tests.techniques.outputs.noisy import overconfidence, plain_overconfidence

LOGITS = torch.tensor(
    [[2.0, -1.0, 0.5], [0.0, -3.0, 1.0], [-1.0, 0.3, 0.2], [4.0, 1.0, -2.0]], dtype=torch.float64
)
ONE_HOT = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1]), 3).double()
# torrvision/focal_calibration@475422a, Losses/mmce.py, `MMCE`: the square, without a root.
OFFICIAL_SQUARE = 0.15208537651899745
OFFICIAL_GRADIENT = [
    [0.028075225282390686, -0.005121637678121581, -0.02295358760426911],
    [-0.036400059142353454, -0.001812252233114642, 0.038212311375468086],
    [-0.011916555446207297, 0.05148091284388852, -0.03956435739768122],
    [0.002363788218355095, -0.0022516834980927636, -0.00011210472026233545],
]
R = torch.tensor([0.9, 0.35, 0.7, 0.55, 0.81, 0.6], dtype=torch.float64)
C = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)


def test_plain_square_and_gradient_are_those_of_the_released_code():
    z = LOGITS.clone().requires_grad_()
    square = mmce(*confidence_and_correctness(z, ONE_HOT), "plain").square()
    square.backward()
    assert float(square.detach()) == pytest.approx(OFFICIAL_SQUARE + 1e-10, rel=1e-12)
    torch.testing.assert_close(z.grad, torch.tensor(OFFICIAL_GRADIENT, dtype=torch.float64))


def test_weighted_value_is_the_papers_three_sums():
    r, right = R.numpy(), C.numpy() == 1
    k = np.exp(-np.abs(r[:, None] - r) / 0.4)
    a, b = 1 - r[right], r[~right]
    value = (np.outer(a, a) * k[np.ix_(right, right)]).sum() / 9
    value += (np.outer(b, b) * k[np.ix_(~right, ~right)]).sum() / 9
    value -= 2 * (np.outer(a, b) * k[np.ix_(right, ~right)]).sum() / 9
    assert float(mmce(R, C)) == pytest.approx(math.sqrt(value + 1e-10), rel=1e-12)


def test_one_kind_of_rows_gives_nothing_to_weigh():
    for same in (torch.ones(6).double(), torch.zeros(6).double()):
        r = R.clone().requires_grad_()
        value = mmce(r, same)
        value.backward()
        assert float(value.detach()) == 0
        assert (r.grad == 0).all()
    assert mmce(R[:0], C[:0], "plain") == 0
    assert mmce(R[:0], C[:0]) == 0


def test_a_calibrated_population_has_none():
    # At confidence 0.75 three of four are right, at 0.5 two of four.
    r = torch.tensor([0.75] * 4 + [0.5] * 4).double()
    c = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0]).double()
    assert float(mmce(r, c, "plain")) == pytest.approx(1e-5, rel=1e-6)
    assert float(mmce(r.flip(0), c, "plain")) > 0.05


def test_overconfidence_falls():
    # Held-out confidence minus accuracy, three seeds: 0.22 to 0.27 without, 0.11 to 0.15 with it.
    for seed in range(3):
        with_it = overconfidence([MMCE(4.0, weighting="plain")], seed)
        assert with_it < plain_overconfidence(seed) - 0.05
