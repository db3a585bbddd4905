"""CutMix: boxes, pixels and labels agree, and the boxes are those of the official code."""

import pytest
import torch

from lightning_reg.mechanisms.batch_transform import draw_beta, draw_centres
from lightning_reg.techniques.inputs.cutmix import boxes_of, cutmix


def images(count: int, height: int, width: int) -> torch.Tensor:
    """Every image has a colour of its own, so that a pixel tells where it is from."""
    colour = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1)
    return colour.expand(count, 3, height, width).clone()


# clovaai/CutMix-PyTorch@2d8eb68, train.py:rand_bbox, run with its random numbers fixed:
# the share before clipping, the centre, the size, and the box.
OFFICIAL = [
    (0.5, (10, 20), (32, 32), [0, 9, 21, 31]),
    (0.5, (0, 31), (32, 32), [0, 20, 11, 32]),
    (0.9, (5, 5), (28, 20), [1, 2, 9, 8]),
    (0.1, (3, 8), (9, 11), [0, 3, 7, 11]),
]


@pytest.mark.parametrize(("lam", "centre", "size", "box"), OFFICIAL)
def test_boxes_are_those_of_the_official_code(lam, centre, size, box):
    share = torch.tensor([lam], dtype=torch.float64)
    assert boxes_of(share, torch.tensor([centre]), *size).tolist() == [box]


@pytest.mark.parametrize("boxes", [torch.tensor([[1, 2, 4, 7]]), None])
def test_every_pixel_is_its_own_or_its_partners_and_lam_counts_them(boxes):
    permutation = torch.tensor([2, 0, 1])
    if boxes is None:
        boxes = torch.tensor([[0, 0, 6, 8], [3, 3, 3, 8], [5, 7, 6, 8]])
    mixed, lam = cutmix(images(3, 6, 8), permutation, boxes)
    own = torch.arange(3.0).view(-1, 1, 1, 1)
    other = permutation.float().view(-1, 1, 1, 1)
    assert ((mixed == own) | (mixed == other)).all()
    kept = (mixed == own).float().mean((1, 2, 3))
    torch.testing.assert_close(kept, lam.expand(3), rtol=0, atol=1e-7)


def test_the_box_is_pasted_where_it_was_cut():
    x = torch.arange(2 * 16, dtype=torch.float32).view(2, 1, 4, 4)
    mixed, _ = cutmix(x, torch.tensor([1, 0]), torch.tensor([[1, 0, 3, 2]]))
    assert torch.equal(mixed[0, 0, 1:3, :2], x[1, 0, 1:3, :2])
    assert torch.equal(mixed[0, 0, 0], x[0, 0, 0])
    assert torch.equal(mixed[0, 0, :, 2:], x[0, 0, :, 2:])


def test_one_box_and_the_same_box_for_each_image_give_the_same():
    x, permutation = torch.randn(3, 2, 5, 6), torch.tensor([1, 2, 0])
    one = torch.tensor([[1, 2, 4, 5]])
    first, lam = cutmix(x, permutation, one)
    second, lams = cutmix(x, permutation, one.expand(3, 4))
    assert torch.equal(first, second)
    assert torch.equal(lam.expand(3), lams)


def test_videos_get_the_box_in_each_frame():
    x = images(2, 4, 4)[:, :, None].expand(2, 3, 5, 4, 4)
    for boxes in (torch.tensor([[0, 0, 2, 4]]), torch.tensor([[0, 0, 2, 4], [0, 0, 2, 4]])):
        mixed, lam = cutmix(x, torch.tensor([1, 0]), boxes)
        assert (mixed[0, :, :, :2] == 1).all()
        assert (mixed[0, :, :, 2:] == 0).all()
        assert (lam == 0.5).all()


def test_the_share_that_is_left_has_the_mean_of_the_official_code():
    rng = torch.Generator().manual_seed(0)
    lam = draw_beta(1.0, 50_000, rng)
    boxes = boxes_of(lam, draw_centres((50_000,), 32, 32, rng), 32, 32)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # 0.7005 is the mean of 200 000 draws of the official rand_bbox on 32 x 32.
    assert abs(float((1 - area / 1024).mean()) - 0.7005) < 0.004


def test_without_rounding_the_mean_is_the_closed_form():
    rng = torch.Generator().manual_seed(0)
    lam = draw_beta(1.0, 50_000, rng)
    size = 4096
    boxes = boxes_of(lam, draw_centres((50_000,), size, size, rng), size, size).double()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # E (r - r^2/4)^2 with r^2 uniform: 1/2 - 1/5 + 1/48.
    assert abs(float((area / size**2).mean()) - (1 / 2 - 1 / 5 + 1 / 48)) < 0.004
