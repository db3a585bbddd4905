"""Cutout: which pixels are masked, and how many on average."""

import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.inputs.cutout import Cutout, cutout

# uoguelph-mlrg/Cutout@287f934, util/cutout.py on 8 x 8 with its random numbers fixed: the centre,
# the length, and the first and the last pixel that are masked.
OFFICIAL = [
    ((0, 0), 4, [0, 0], [1, 1]),
    ((5, 7), 4, [3, 5], [6, 7]),
    ((3, 3), 6, [0, 0], [5, 5]),
]


@pytest.mark.parametrize(("centre", "length", "first", "last"), OFFICIAL)
def test_squares_are_those_of_the_official_code(centre, length, first, last):
    masked = cutout(torch.ones(1, 1, 8, 8), torch.tensor([[centre]]), length)
    pixels = (masked[0, 0] == 0).nonzero()
    assert pixels[0].tolist() == first
    assert pixels[-1].tolist() == last


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_square_inside_has_its_length_also_where_it_is_odd(length):
    masked = cutout(torch.ones(1, 1, 16, 16), torch.tensor([[[8, 8]]]), length)
    assert int((masked == 0).sum()) == length**2


def test_all_channels_and_frames_have_the_same_mask():
    x = torch.rand(2, 3, 4, 8, 8) + 1
    masked = cutout(x, torch.tensor([[[1, 1]], [[6, 3]]]), 3) == 0
    assert (masked == masked[:, :1, :1]).all()
    assert not torch.equal(masked[0], masked[1])


def test_outside_the_squares_pixels_are_untouched_and_inside_they_are_the_fill():
    x = torch.randn(1, 2, 6, 6)
    masked = cutout(x, torch.tensor([[[0, 0], [5, 5]]]), 4, fill=7.0)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[:2, :2] = True
    inside[3:, 3:] = True
    assert (masked[0, :, inside] == 7).all()
    assert torch.equal(masked[0, :, ~inside], x[0, :, ~inside])


@pytest.mark.parametrize(("length", "share"), [(16, 0.19141), (8, 0.05493), (20, 0.27809)])
def test_the_expected_share_over_all_centres_is_that_of_clipped_squares(length, share):
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    centres = torch.stack([rows, columns], -1).reshape(-1, 1, 2)
    masked = cutout(torch.ones(1024, 1, 32, 32), centres, length)
    assert abs(float((masked == 0).double().mean()) - share) < 1e-5


@pytest.mark.parametrize("arguments", [{"length": 0}, {"length": True}, {"holes": 0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="Cutout"):
        Cutout(**arguments)
