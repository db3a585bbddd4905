"""Conservation laws: exact totals, the released code's values, and no variance that grows."""

import lightning as L
import pytest
import torch
from torch.distributions import MultivariateNormal

from lightning_reg import ConservationProjectionMixin
from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.fields.conservation_projection import (
    conservation_nll,
    conservation_projection,
    trapezoid_weights,
)

# amazon-science/probconserv@bfd388c, deep_pdes/attentive_neural_process/probconserv.py:
# PhysNP._apply_constraint and _constrained_log_prob at these points; gradients by mean and standard
# deviation of |mean|^2 plus the trace of the covariance.
POINTS = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
WEIGHTS = [0.05, 0.15, 0.25, 0.35, 0.2]
MEAN = [1.0, 0.8, 0.5, 0.2, -0.1]
SCALE = [0.1, 0.2, 0.3, 0.2, 0.1]
TOTAL = 0.5
OFFICIAL = {
    0.1: {
        "mean": [1.0035470, 0.8425630, 0.6596110, 0.2993135, -0.0858124],
        "variances": [0.00998856, 0.0383524, 0.0668307, 0.0310297, 0.00981693],
        "by_mean": [1.8953449, 1.3498788, 0.7604768, -0.1836162, -0.6186209],
        "by_scale": [0.3347723, 0.9555930, 1.1585995, 0.1144454, 0.0295837],
    },
    0.0: {
        "mean": [1.0065401, 0.8784810, 0.7943038, 0.3831224, -0.0738397],
        "variances": [0.00997890, 0.0369620, 0.0472785, 0.0234599, 0.00966245],
        "by_mean": [1.7695187, 1.0262779, 0.3708006, -0.9386850, -1.1219249],
        "by_scale": [0.4332560, 1.1922623, 0.9561854, -1.3906506, -0.3581998],
    },
}
TARGETS = [0.9, 0.9, 0.4, 0.1, 0.0]
# At sigma = 0.1, without the constant log N(0; 0, 0.1^2) = 1.3836466.
LOG_PROB = 3.5391731 - 1.3836466
NLL_BY_MEAN = [9.9313517, -2.7059484, 0.7678617, 2.0194507, -10.2745981]
NLL_BY_SCALE = [-0.0109730, 3.5525346, 2.1401854, 2.6749043, -0.1755247]


def double(values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def covariance(n=4, seed=0):
    root = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)


def test_trapezoid_is_that_of_the_released_code_and_exact_for_lines():
    torch.testing.assert_close(trapezoid_weights(POINTS), double(WEIGHTS))
    integral = trapezoid_weights(POINTS) @ (3 * POINTS + 1)
    assert float(integral) == pytest.approx(2.5)


@pytest.mark.parametrize("noise", OFFICIAL)
def test_values_and_gradients_are_those_of_the_released_code(noise):
    mean, scale = double(MEAN, True), double(SCALE, True)
    found = conservation_projection(mean, scale**2, double(WEIGHTS), double(TOTAL), noise)
    gradients = torch.autograd.grad(found[0].square().sum() + found[1].sum(), (mean, scale))
    wanted = OFFICIAL[noise]
    for value, name in zip((*found, *gradients), wanted, strict=True):
        torch.testing.assert_close(value, double(wanted[name]), rtol=2e-5, atol=2e-6)


def test_euclidean_projection_is_the_released_code_s_and_the_nearest():
    found, none = conservation_projection(double(MEAN), None, double(WEIGHTS), double(TOTAL))
    assert none is None
    torch.testing.assert_close(found, double([1.031, 0.893, 0.655, 0.417, 0.024]))
    # Nothing that moves along the law is left in the change.
    along = torch.linalg.svd(double(WEIGHTS)[None])[2][1:]
    assert float((along @ (found - double(MEAN))).abs().max()) < 1e-12


def test_loss_is_that_of_the_released_code():
    mean, scale = double(MEAN, True), double(SCALE, True)
    nll = conservation_nll(double(TARGETS), mean, scale**2, double(WEIGHTS), 0.1)
    assert float(nll) == pytest.approx(-LOG_PROB, abs=2e-6)
    by_mean, by_scale = torch.autograd.grad(nll, (mean, scale))
    torch.testing.assert_close(by_mean, double(NLL_BY_MEAN), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(by_scale, double(NLL_BY_SCALE), rtol=2e-5, atol=2e-5)


def test_full_covariance_is_that_of_the_gaussian_conditional():
    mean, spread = double([1.0, -1.0, 0.5, 2.0]), covariance()
    law, total = double([[1.0, 2.0, 0.0, -1.0], [0.5, 0.0, 1.0, 1.0]]), double([0.3, 1.0])
    found, reduced = conservation_projection(mean, spread, law, total, 0.2)
    # In information form: precisions add.
    precision = torch.linalg.inv(spread) + law.T @ law / 0.04
    expected = torch.linalg.inv(precision)
    torch.testing.assert_close(reduced, expected, rtol=1e-8, atol=1e-9)
    shift = torch.linalg.inv(spread) @ mean + law.T @ total / 0.04
    torch.testing.assert_close(found, expected @ shift, rtol=1e-8, atol=1e-9)


def test_variances_are_the_diagonal_of_the_full_covariance():
    mean, variances = double(MEAN), double(SCALE) ** 2
    arguments = double(WEIGHTS), double(TOTAL), 0.05
    diagonal = conservation_projection(mean, variances, *arguments)[1]
    full = conservation_projection(mean, torch.diag(variances), *arguments)[1]
    torch.testing.assert_close(diagonal, full.diagonal())


def test_law_holds_to_rounding_and_projecting_again_does_nothing():
    mean, spread = torch.randn(3, 4, dtype=torch.float64), covariance()
    law, total = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    found, reduced = conservation_projection(mean, spread.expand(3, 4, 4), law, total)
    assert float((found @ law.T - total).abs().max()) < 1e-10
    assert float((law @ reduced @ law.T).abs().max()) < 1e-10
    again, _ = conservation_projection(found, spread.expand(3, 4, 4), law, total)
    torch.testing.assert_close(again, found)
    assert (reduced.diagonal(dim1=-2, dim2=-1) <= spread.diagonal()).all()
    assert torch.linalg.eigvalsh(spread - reduced).min() > -1e-10


def test_half_precision_predictions_obey_to_their_own_rounding():
    mean = torch.tensor(MEAN, dtype=torch.bfloat16)
    found, variances = conservation_projection(
        mean, torch.tensor(SCALE) ** 2, torch.tensor(WEIGHTS), torch.tensor(TOTAL)
    )
    assert found.dtype == torch.bfloat16
    assert variances.dtype == torch.float32
    assert float(found.double() @ double(WEIGHTS)) == pytest.approx(TOTAL, abs=4e-3)


def test_loss_is_the_density_among_functions_of_the_same_total():
    # p(u | G u) = p(u) / p(G u), with torch's distributions.
    u, mean, variances = double([0.3, -0.2, 1.0]), double([0.1, 0.4, -0.5]), double([0.5, 1.0, 2.0])
    law = double([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]])
    prior = MultivariateNormal(mean, torch.diag(variances))
    total = MultivariateNormal(law @ mean, law @ torch.diag(variances) @ law.T)
    expected = total.log_prob(law @ u) - prior.log_prob(u)
    torch.testing.assert_close(conservation_nll(u, mean, variances, law), expected)


class Net(ConservationProjectionMixin, L.LightningModule):
    pass


def test_law_of_the_module_is_used_unless_a_call_brings_its_own():
    net = Net()
    with pytest.raises(ArgumentError, match="knows no law"):
        net.conserve(double(MEAN), double(TOTAL))
    net.set_conservation(double(WEIGHTS))
    assert float(net.conserve(double(MEAN), double(TOTAL))[0] @ double(WEIGHTS)) == TOTAL
    ones = torch.ones(5, dtype=torch.float64)
    own, _ = net.conserve(double(MEAN), double(7.0), constraint=ones)
    assert float(own.sum()) == pytest.approx(7.0)
    assert "conservation_weights" not in net.state_dict()
    with pytest.raises(ArgumentError, match="needs predictions at 5 points"):
        net.conserve(double(MEAN[:4]), double(TOTAL))
    torch.testing.assert_close(
        net.conserved_nll(double(TARGETS), double(MEAN), double(SCALE) ** 2),
        conservation_nll(double(TARGETS), double(MEAN), double(SCALE) ** 2, double(WEIGHTS)),
    )
