"""Functional entropy and Fisher information against closed forms and the official code."""

import math

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    FunctionalEntropy,
    FunctionalFisherInformation,
    functional_entropy,
    functional_fisher_information,
    perturbed_cross_entropy,
)

_rng = np.random.default_rng(0)
# Quantiles of the normal distribution in place of draws: expectations without noise.
Z = torch.special.ndtri((torch.arange(200000).double() + 0.5) / 200000)


@pytest.mark.parametrize("a", [0.5, 1.0])
def test_the_log_sobolev_inequality_is_an_equality_for_exponentials(a):
    f = torch.exp(a * Z)
    given = (f.view(1, -1, 1), (a * f).square().view(1, -1, 1))
    entropy = float(functional_entropy(*given, num_modalities=1))
    fisher = float(functional_fisher_information(*given, num_modalities=1))
    exact = a * a / 2 * math.exp(a * a / 2)
    assert entropy == pytest.approx(exact, rel=2e-3)
    assert fisher / 2 == pytest.approx(exact, rel=2e-3)


def test_the_bound_holds_for_a_network_under_gaussian_noise():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    model = model.double()
    x = torch.randn(6, 3).double()
    generator = torch.Generator().manual_seed(1)
    for sigma in (0.1, 1.0):
        given = perturbed_cross_entropy(model, [x], sigma=sigma, draws=300, generator=generator)
        entropy = functional_entropy(*given, num_modalities=1)
        fisher = functional_fisher_information(*given, num_modalities=1)
        assert 0 < float(entropy) <= float(sigma**2 / 2 * fisher)


def test_values_and_gradients_are_those_of_a_linear_model():
    weight = torch.tensor(_rng.normal(size=(3, 2)))
    x = torch.tensor(_rng.normal(size=(5, 3)))
    values, squares = perturbed_cross_entropy(lambda z: z @ weight, [x], sigma=1e-9, draws=1)
    p = (x @ weight).softmax(1)
    np.testing.assert_allclose(values[0, 0], -(p * p.log()).sum(1), atol=1e-7)
    # At z = x the cross-entropy to p is at its least: the gradient is 0.
    np.testing.assert_allclose(squares, torch.zeros(1, 1, 5), atol=1e-12)


def test_a_modality_that_the_model_does_not_read_has_no_entropy():
    x, y = (torch.tensor(_rng.normal(size=(8, 3))) for _ in range(2))
    given = perturbed_cross_entropy(lambda a, b: a + 0 * b, [x, y], sigma=0.5, draws=20)
    entropy = functional_entropy(*given, num_modalities=2)
    fisher = functional_fisher_information(*given, num_modalities=2)
    assert entropy[0] > 1e-3
    assert fisher[0] > 1e-3
    assert entropy[1].abs() < 1e-12
    assert fisher[1] == 0


def test_equals_numpy():
    f, squares = _rng.uniform(0.1, 2, (2, 5, 7)), _rng.uniform(0, 3, (2, 5, 7))
    entropy = (f * np.log(f)).mean(1) - f.mean(1) * np.log(f.mean(1))
    given = (torch.tensor(f), torch.tensor(squares))
    np.testing.assert_allclose(
        functional_entropy(*given, num_modalities=2), entropy.mean(1), atol=1e-12
    )
    np.testing.assert_allclose(
        functional_fisher_information(*given, num_modalities=2),
        (squares / f).mean((1, 2)),
        atol=1e-12,
    )


def test_the_official_code_divides_by_the_mean_of_the_batch():
    # itaigat/removing-bias-in-multi-modal-classifiers@f76416c, get_batch_norm of gradients
    # [[1, 2], [3, 0]] with losses whose mean is 2.5: 2.8. Row by row (1 and 4): 3.625.
    values, squares = torch.tensor([[[1.0, 4.0]]]), torch.tensor([[[5.0, 9.0]]])
    official = 2.8
    assert float(squares.mean() / values.mean()) == pytest.approx(official)
    value = functional_fisher_information(values, squares, num_modalities=1)
    assert float(value) == pytest.approx((5 / 1 + 9 / 4) / 2)


def test_draws_work_in_inference_mode_and_leave_no_graph():
    layer = torch.nn.Linear(3, 2)
    with torch.inference_mode():
        x, y = torch.randn(4, 3), torch.randn(4, 3)
        values, squares = perturbed_cross_entropy(lambda a, b: layer(a * b), [x, y], sigma=0.1)
    assert not values.requires_grad
    assert not squares.requires_grad
    assert layer.weight.grad is None
    assert (squares > 0).all()


def test_draws_come_from_the_generator_that_is_given():
    x, state = torch.randn(4, 3), torch.get_rng_state()
    one, other = (
        perturbed_cross_entropy(
            lambda z: z, [x], sigma=0.1, generator=torch.Generator().manual_seed(3)
        )[0]
        for _ in range(2)
    )
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_collection_counts_once():
    metrics = MetricCollection(
        [FunctionalEntropy(num_modalities=1), FunctionalFisherInformation(num_modalities=1)]
    )
    metrics.update(torch.rand(1, 3, 4) + 0.1, torch.rand(1, 3, 4))
    assert len(metrics.compute_groups) == 1


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="num_modalities"):
        FunctionalEntropy(num_modalities=0)
    with pytest.raises(ArgumentError, match="sigma"):
        perturbed_cross_entropy(lambda z: z, [torch.ones(1, 2)], sigma=0.0)
