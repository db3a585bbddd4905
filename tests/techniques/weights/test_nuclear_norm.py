"""Nuclear norm: singular values, U V^T, and the rank that it leaves."""

import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.nuclear_norm import NuclearNorm, nuclear_norm
from tests.engine.simple import fit
from tests.techniques.weights.penalty import Still, check_closed_form, check_proximal, matrix


def test_value_is_the_nuclear_norm():
    kernel = torch.randn(4, 2, 3, dtype=torch.float64)
    expected = np.linalg.norm(kernel.numpy().reshape(4, 6), "nuc")
    np.testing.assert_allclose(nuclear_norm(kernel).item(), expected, rtol=1e-12)


def test_closed_form_is_the_gradient_of_the_value_for_layers_of_one_shape_and_others():
    check_closed_form(NuclearNorm(), [matrix(), matrix(2, 5), matrix(seed=1)])


def test_gradient_of_a_matrix_without_full_rank_is_that_of_least_norm():
    w = matrix(4, 1) @ matrix(1, 3, seed=1)
    values, (gradient,) = NuclearNorm().closed_form([w])
    torch.testing.assert_close(gradient, w / w.norm())
    torch.testing.assert_close(values[0], w.norm())
    assert torch.equal(NuclearNorm().closed_form([torch.zeros(2, 3)])[1][0], torch.zeros(2, 3))


def test_gradient_shortens_all_singular_values_alike():
    w = matrix()
    _, (gradient,) = NuclearNorm().closed_form([w])
    before, after = torch.linalg.svdvals(w), torch.linalg.svdvals(w - 0.1 * gradient)
    torch.testing.assert_close(after, before - 0.1)


def test_proximal_step_is_the_minimum_and_lowers_the_rank():
    w = matrix()
    least = float(torch.linalg.svdvals(w)[-1])
    found = check_proximal(NuclearNorm(), w, 1.1 * least, nuclear_norm)
    assert torch.linalg.matrix_rank(found) == 2
    many = NuclearNorm().proximal_form([matrix(seed=1), matrix(2, 5), w], [0.1, 0.2, 1.1 * least])
    torch.testing.assert_close(many[2], found)
    torch.testing.assert_close(
        torch.linalg.svdvals(many[1]), (torch.linalg.svdvals(matrix(2, 5)) - 0.2).clamp_min(0)
    )


def test_training_leaves_the_singular_values_above_what_was_taken():
    module = Still()
    before = torch.linalg.svdvals(module.net[0].weight.detach())
    technique = NuclearNorm(0.8, mode="proximal", parameters="net.0.weight")
    fit([technique], module=module, max_epochs=1)
    after = torch.linalg.svdvals(module.net[0].weight.detach())
    torch.testing.assert_close(after, (before - 4 * 0.08).clamp_min(0), atol=1e-5, rtol=0)


def test_cost_is_that_of_a_decomposition():
    technique = NuclearNorm()
    assert technique.cost(torch.empty(8, 2, 3, 3)) == 8 * 18 * 8
    assert technique.cost(torch.empty(50, 3)) == 50 * 3 * 3


def test_negative_strength_is_refused():
    with pytest.raises(ArgumentError, match="NuclearNorm"):
        NuclearNorm(-0.1)
