"""Entropy-guided attention: values of the official code, the margin, and learned thresholds."""

import math

import pytest
import torch

from lightning_reg.techniques.features.attention_entropy_regularization import (
    AttentionEntropyRegularization,
    attention_entropy_regularization,
)
from tests.techniques.features.test_attention_entropy_maximization import fit_transformer, fixed


def test_value_and_gradient_are_those_of_the_official_code():
    # Nandan91/entropy-guided-attention-llm@728944d, compute_loss with loss_coeff=1 of two layers:
    # it sums over the batch of 2 and the 3 queries. It adds 1e-9 inside the logarithm.
    layers = [fixed(2, 2, 3, 4), fixed(2, 2, 3, 4).flip(0) * 0.5]
    layers = [z.requires_grad_() for z in layers]
    theta = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
    values = [attention_entropy_regularization(z.log_softmax(-1), theta) for z in layers]
    loss = torch.stack(values).mean(0).sum() * 3
    loss.backward()
    assert loss.item() == pytest.approx(1.3398267045521557, abs=1e-7)
    assert theta.grad.tolist() == pytest.approx([-2.7375320085, 3.2562348311], abs=1e-6)
    expected = [0.1077797, -0.0327717, -0.0046019, -0.0704061]
    assert layers[0].grad[0, 1, 0].tolist() == pytest.approx(expected, abs=1e-6)
    expected = [-0.0867036, 0.0192149, 0.0264583, 0.0410304]
    assert layers[1].grad[1, 0, 2].tolist() == pytest.approx(expected, abs=1e-6)


def test_uniform_attention_pays_half_of_its_largest_entropy_squared():
    z = torch.zeros(3, 2, 5, 16, dtype=torch.float64).log_softmax(-1)
    value = attention_entropy_regularization(z, 0.5, 0.2)
    assert value.tolist() == pytest.approx([(0.5 * math.log(16)) ** 2] * 3, abs=1e-12)


def test_collapse_and_overload_are_alike_at_the_middle():
    uniform = torch.zeros(1, 1, 1, 8).log_softmax(-1)
    one = torch.full((1, 1, 1, 8), -torch.inf)
    one[..., 3] = 0.0
    both = [attention_entropy_regularization(z, 0.5).item() for z in (uniform, one)]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


def test_inside_the_margin_there_is_nothing():
    z = torch.zeros(1, 1, 1, 9, dtype=torch.float64, requires_grad=True)
    value = attention_entropy_regularization(z.log_softmax(-1), 0.85, 0.2)
    value.sum().backward()
    assert value.item() == 0
    assert (z.grad == 0).all()
    outside = attention_entropy_regularization(z.log_softmax(-1), 0.75, 0.2)
    assert outside.item() == pytest.approx((0.25 * math.log(9)) ** 2, abs=1e-12)


def test_descent_moves_towards_the_threshold_from_both_sides():
    for scale, sign in ((0.1, -1), (20.0, 1)):  # nearly uniform, nearly one-hot
        z = (fixed(1, 1, 1, 6) * scale / 3).requires_grad_()
        value = attention_entropy_regularization(z.log_softmax(-1), 0.5, 0.0)
        (gradient,) = torch.autograd.grad(value.sum(), z)

        def entropy(logits):
            logs = logits.log_softmax(-1)
            return -(logs.exp() * logs).sum()

        moved = entropy(z - gradient / gradient.norm() * 1e-3) - entropy(z)
        assert moved * sign > 0


def test_the_context_size_sets_the_largest_entropy():
    z = torch.zeros(1, 1, 1, 4, dtype=torch.float64).log_softmax(-1)
    value = attention_entropy_regularization(z, 1.0, 0.0, context_size=16)
    assert value.item() == pytest.approx((math.log(4) - math.log(16)) ** 2, abs=1e-12)


def test_masked_keys_pass_finite_gradients():
    z = fixed(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    z.requires_grad_()
    attention_entropy_regularization(z.log_softmax(-1), 0.5, 0.0).sum().backward()
    assert z.grad.isfinite().all()


def test_thresholds_of_the_module_are_trained_with_it():
    technique = AttentionEntropyRegularization(
        1.0, layers="mha", from_logits=False, element=1, thresholds="thresholds"
    )
    module, _, _ = fit_transformer(technique)
    # Fresh attention is nearly uniform: heads are allowed more entropy than half.
    assert (module.thresholds > 0.55).all()


def test_without_a_name_thresholds_stay():
    technique = AttentionEntropyRegularization(1.0, layers="mha", from_logits=False, element=1)
    module, _, _ = fit_transformer(technique)
    assert (module.thresholds == 0.5).all()
