"""Jacobian penalty: the official numbers, and flatter networks."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.gradients.jacobian_penalty import JacobianPenalty, jacobian_penalty
from tests.engine.simple import INPUTS, LABELS, fit, weights

# Value and gradient by W of JacobianReg(n=-1) of facebookresearch/jacobian_regularizer@32bb044,
# jacobian/jacobian.py, run in float64 on tanh(x W^T).
X = (torch.arange(6, dtype=torch.float64).view(2, 3) * 0.9).cos()
W = (torch.arange(12, dtype=torch.float64).view(4, 3) * 0.5).sin()
REFERENCE_VALUE = 0.7222127466014211
REFERENCE_GRADIENT = [
    [-0.3267362272, 0.0658284242, 0.5896967938],
    [-0.0738478676, -0.0447585215, 0.0302091997],
    [0.2288703773, -0.1832154844, -0.6157853993],
    [0.083926613, 0.0487439265, -0.0361187149],
]


def penalty(x, w, projections="exact", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return jacobian_penalty(torch.tanh(x @ w.T), x, projections, generator)


def test_value_and_gradient_of_the_official_code():
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    value = penalty(x, w).mean()
    assert value.item() == pytest.approx(REFERENCE_VALUE, abs=1e-12)
    (gradient,) = torch.autograd.grad(value, w)
    expected = torch.tensor(REFERENCE_GRADIENT, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_a_linear_map_has_half_its_squared_norm_everywhere():
    x = X.clone().requires_grad_()
    expected = 0.5 * W.square().sum().expand(2)
    torch.testing.assert_close(jacobian_penalty(x @ W.T, x), expected)


def test_one_projection_is_unbiased():
    x = X.clone().requires_grad_()
    draws = torch.stack([penalty(x, W, 1, seed) for seed in range(2000)]).detach()
    standard_error = draws.std(0) / 2000**0.5
    gap = (draws.mean(0) - penalty(x, W)).abs()
    # Four standard errors; the seeds are fixed.
    assert (gap < 4 * standard_error).all()
    assert (standard_error > 0).all()


def test_gradients_agree_with_finite_differences():
    arguments = X.clone().requires_grad_(), W.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: penalty(x, w, "exact"), arguments)
    assert torch.autograd.gradcheck(lambda x, w: penalty(x, w, 1), arguments)


def mean_norm(module):
    x = INPUTS.clone().requires_grad_()
    return jacobian_penalty(module.net(x), x).mean().item()


@pytest.mark.parametrize("projections", ["exact", 1])
def test_training_with_it_makes_the_network_flatter(projections):
    plain, _ = fit(max_epochs=40)
    ours, _ = fit([JacobianPenalty(0.3, projections=projections)], max_epochs=40)
    assert mean_norm(ours) < 0.5 * mean_norm(plain)


def test_flatter_networks_keep_their_answer_under_noise():
    # The paper's claim: for a given distance from the data fewer predictions flip.
    plain, _ = fit(max_epochs=60)
    ours, _ = fit([JacobianPenalty(0.3, projections="exact")], max_epochs=60)

    def kept(module):
        torch.manual_seed(0)
        noisy = INPUTS.repeat(50, 1) + 0.5 * torch.randn(50 * len(INPUTS), 8)
        with torch.no_grad():
            change = module.net(noisy) - module.net(INPUTS).repeat(50, 1)
        return change.square().mean().item()

    assert kept(ours) < 0.5 * kept(plain)
    with torch.no_grad():
        assert F.cross_entropy(ours.net(INPUTS), LABELS) < 1.5


def test_projections_are_drawn_anew_in_every_step_and_the_same_in_every_run():
    first, _ = fit([JacobianPenalty(0.3)])
    again, _ = fit([JacobianPenalty(0.3)])
    other, _ = fit([JacobianPenalty(0.3, name="other")])
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_the_users_random_numbers_are_not_touched():
    class Draws(type(fit(max_epochs=1)[0])):
        drawn = []

        def training_step(self, batch, batch_idx):
            self.drawn.append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    fit([JacobianPenalty(0.3)], module=Draws(), max_epochs=1)
    fit(module=Draws(), max_epochs=1)
    assert Draws.drawn[:4] == Draws.drawn[4:]


@pytest.mark.parametrize("projections", [0, -1, 1.5, "all", True])
def test_bad_arguments_are_refused(projections):
    with pytest.raises(ArgumentError, match="JacobianPenalty"):
        JacobianPenalty(projections=projections)
