"""Orthogonal regularization: forms, gradients, and the released code's numbers."""

import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.orthogonal_regularizer import (
    OrthogonalRegularizer,
    orthogonal_regularizer,
)
from tests.engine.simple import fit

FORMS = ("off_diagonal", "full")


def matrix(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (6, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_value_is_the_sum_over_pairs_of_rows(shape, form):
    w = matrix(*shape).numpy()
    expected = 0.0
    for i in range(len(w)):
        for j in range(len(w)):
            if form == "full":
                expected += (np.dot(w[i], w[j]) - (i == j)) ** 2
            elif i != j:
                expected += np.dot(w[i], w[j]) ** 2
    value = orthogonal_regularizer(torch.from_numpy(w), form)
    np.testing.assert_allclose(value.item(), expected, rtol=1e-12)


def test_orthogonal_filters_of_any_norm_are_free_off_the_diagonal_only():
    w = torch.diag(torch.tensor([1.0, 5.0, 0.1]))
    assert orthogonal_regularizer(w) == 0
    # (25 - 1)^2 + (0.01 - 1)^2
    assert orthogonal_regularizer(w, "full") == pytest.approx(576.9801)


@pytest.mark.parametrize("shape", [(3, 5), (6, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_closed_form_is_the_gradient_of_the_value(shape, form):
    w = matrix(*shape).requires_grad_()
    value = orthogonal_regularizer(w, form)
    (expected,) = torch.autograd.grad(value, w)
    values, (gradient,) = OrthogonalRegularizer(form=form).closed_form([w.detach()])
    torch.testing.assert_close(values[0], value.detach())
    torch.testing.assert_close(gradient, expected)
    assert torch.autograd.gradcheck(lambda w: orthogonal_regularizer(w, form), (w,))


@pytest.mark.parametrize(
    ("form", "released"),
    [
        ("off_diagonal", [[-0.5, -3.0, -2.0], [-2.0, -1.0, 4.0]]),
        ("full", [[8.0, 1.25, -19.0], [-0.84375, 5.9375, 8.625]]),
    ],
)
def test_released_code_adds_half_of_the_gradient(form, released):
    # ajbrock/BigGAN-PyTorch@9845943, utils.py: ortho and default_ortho at strength 1.
    w = torch.tensor([[1.0, 0.5, -2.0], [0.25, 1.5, 1.0]], dtype=torch.float64)
    _, (gradient,) = OrthogonalRegularizer(form=form).closed_form([w])
    torch.testing.assert_close(gradient, 2 * torch.tensor(released, dtype=torch.float64))


def test_training_makes_rows_orthogonal_and_leaves_their_norms():
    plain, _ = fit(max_epochs=30)
    ours, _ = fit([OrthogonalRegularizer(0.2, parameters="net.4.weight")], max_epochs=30)

    def cosines(module):
        w = module.net[4].weight.detach()
        unit = w / w.norm(dim=1, keepdim=True)
        return (unit @ unit.T - torch.eye(4)).abs().max()

    assert cosines(plain) > 0.2
    assert cosines(ours) < 0.05
    assert (ours.net[4].weight.norm(dim=1) > 0.5).all()


def test_cost_is_that_of_the_smaller_gram_matrix():
    technique = OrthogonalRegularizer()
    assert technique.cost(torch.empty(8, 2, 3, 3)) == 8 * 18 * 8
    assert technique.cost(torch.empty(50, 3)) == 50 * 3 * 3


@pytest.mark.parametrize("arguments", [{"strength": -1.0}, {"form": "rows"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="OrthogonalRegularizer"):
        OrthogonalRegularizer(**arguments)
