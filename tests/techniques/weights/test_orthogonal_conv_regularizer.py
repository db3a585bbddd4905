"""Orthogonal convolutions: the dense circular operator, strides, groups, and what training does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.engine import ArgumentError, UnsupportedError
from lightning_reg.techniques.weights.orthogonal_conv_regularizer import (
    OrthogonalConvRegularizer,
    orthogonal_conv_regularizer,
)
from tests.engine.simple import Host, fit

# (M, C, k), stride; more filters than C S^2 in the third, fifth and last.
KERNELS = [((3, 4, 3), 1), ((6, 2, 3), 2), ((7, 2, 3), 1), ((4, 3, 2), 1), ((9, 2, 2), 2)]
KERNELS += [((4, 2, 4), 2), ((5, 1, 3), 2)]


def kernel(shape, places=2):
    m, c, k = shape
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, c, *[k] * places, dtype=torch.float64, generator=generator) / 2


def dense(weight, stride, size):
    """The matrix of a convolution with circular padding on images of this size."""
    places = weight.ndim - 2
    inputs = weight.shape[1] * size**places
    basis = torch.eye(inputs, dtype=weight.dtype).view(inputs, weight.shape[1], *[size] * places)
    padded = F.pad(basis, [n for k in weight.shape[2:] for n in (0, k - 1)], mode="circular")
    convolve = {1: F.conv1d, 2: F.conv2d}[places]
    return convolve(padded, weight, stride=stride).flatten(1).T


def defect(operator, rows):
    gram = operator @ operator.T if rows else operator.T @ operator
    return (gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum()


@pytest.mark.parametrize("places", [1, 2])
@pytest.mark.parametrize(("shape", "stride"), KERNELS)
def test_it_is_the_dense_operators_defect_over_the_number_of_places(shape, stride, places):
    k, n = kernel(shape, places), 5 if places == 2 else 7
    if shape[0] > shape[1] * stride**places and stride * n < 2 * shape[2] - 1:
        pytest.fail("the identity needs larger images")
    operator = dense(k, stride, stride * n)
    expected = defect(operator, rows=shape[0] <= shape[1] * stride**places)
    torch.testing.assert_close(
        n**places * orthogonal_conv_regularizer(k, stride), expected, rtol=1e-9, atol=1e-9
    )


def test_identity_fails_where_the_image_is_smaller_than_the_overlaps():
    k = kernel((3, 4, 3))
    operator = dense(k, 1, 4)
    assert 16 * orthogonal_conv_regularizer(k) != pytest.approx(
        defect(operator, True).item(), rel=1e-3
    )


def test_groups_are_operators_of_their_own():
    k = kernel((6, 2, 3))
    parts = orthogonal_conv_regularizer(k[:3]) + orthogonal_conv_regularizer(k[3:])
    torch.testing.assert_close(orthogonal_conv_regularizer(k, groups=2), parts)
    # Depthwise: more filters than channels in each group.
    k = kernel((6, 1, 3))
    parts = sum(orthogonal_conv_regularizer(k[i : i + 2]) for i in (0, 2, 4))
    torch.testing.assert_close(orthogonal_conv_regularizer(k, groups=3), parts)


def test_delta_kernels_are_orthogonal_and_orthogonal_rows_are_not_enough():
    k = torch.zeros(3, 4, 3, 3, dtype=torch.float64)
    k[range(3), range(3), [0, 1, 2], [2, 1, 0]] = 1
    assert orthogonal_conv_regularizer(k) == 0
    # Tall: the columns of the operator; without the constant it would be 4 - 2.
    tall = torch.zeros(4, 2, 1, 1, dtype=torch.float64)
    tall[[0, 1], [0, 1]] = 1
    assert orthogonal_conv_regularizer(tall) == 0
    rows = torch.linalg.qr(kernel((3, 2, 3)).flatten(1).T).Q.T.reshape(3, 2, 3, 3)
    assert orthogonal_conv_regularizer(rows) > 0.1


def test_released_code_takes_the_root():
    # Wang et al., deconv_orth_dist(kernel, stride=1, padding=1), worked out by hand: filters
    # (1, 1) and (1, -1) of one channel overlap to [[1, 2, 1], [-1, 0, 1]], [[1, 0, -1],
    # [-1, 2, -1]]; less the identity in the middle the squares sum to 2 + 1 + 2 + 2 + 1 + 2 = 10.
    k = torch.tensor([[[[1.0, 1.0]]], [[[1.0, -1.0]]]], dtype=torch.float64)[..., 0, :]
    assert orthogonal_conv_regularizer(k).item() + 1 == pytest.approx(10)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("shape", "stride"), [*KERNELS, ((4, 2, 5), 3), ((4, 2, 1), 2)])
def test_closed_form_is_the_gradient_of_the_value(shape, stride, groups):
    weight = kernel((2 * shape[0], *shape[1:]))
    layer = nn.Conv2d(groups * shape[1], len(weight), shape[2], stride=stride, groups=groups)
    layer.weight = nn.Parameter(weight)

    class Context:
        module = nn.Sequential(layer)

    technique = OrthogonalConvRegularizer()
    weights = {"0.weight": layer.weight}
    expected = technique.values_of(Context, weights)
    values, (found,) = technique.closed_form_of(Context, weights)
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), layer.weight)[0])


class Convolutional(Host):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 6, 3, bias=False), nn.ReLU(),
            nn.Conv1d(6, 4, 3, stride=2, bias=False), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        return 0.01 * super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def test_training_brings_all_singular_values_of_the_operators_to_one():
    module, _ = fit([OrthogonalConvRegularizer(1.0)], module=Convolutional(), max_epochs=60)
    for layer in (module.net[1], module.net[3]):
        operator = dense(layer.weight.detach().double(), layer.stride[0], 12)
        assert (torch.linalg.svdvals(operator) - 1).abs().max() < 0.02
    plain, _ = fit(module=Convolutional(), max_epochs=60)
    values = torch.linalg.svdvals(dense(plain.net[1].weight.detach().double(), 1, 12))
    assert (values - 1).abs().max() > 0.2


def test_layers_that_are_no_plain_convolutions_are_refused():
    module = Convolutional()
    with pytest.raises(UnsupportedError, match=r"net\.5\.weight"):
        fit([OrthogonalConvRegularizer(1.0, parameters="weight")], module=module)
    module.net[1] = nn.Conv1d(1, 6, 3, padding=2, dilation=2)
    with pytest.raises(UnsupportedError, match="dilation"):
        fit([OrthogonalConvRegularizer(1.0)], module=module)


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="OrthogonalConvRegularizer"):
        OrthogonalConvRegularizer(-1.0)
    with pytest.raises(ArgumentError, match="dimensions"):
        orthogonal_conv_regularizer(torch.ones(2, 2))
