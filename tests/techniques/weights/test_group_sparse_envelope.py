"""Group sparse envelope: the k-support norm, its proximal step, and exactly k groups."""

import itertools

import lightning as L
import pytest
import scipy.optimize
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.group_sparse_envelope import (
    GroupSparseEnvelope,
    group_sparse_envelope,
)
from tests.engine.simple import Host, fit, trainer
from tests.techniques.weights.penalty import check_closed_form, check_proximal, matrix


def envelope(k, **options):
    return GroupSparseEnvelope(0.1, k=k, finish=None, **options)


@pytest.mark.parametrize("groups", ["rows", "columns", "elements"])
def test_all_groups_give_the_ridge_and_one_the_squared_sum(groups):
    w = matrix(5, 4)
    norms = {"rows": w.norm(dim=1), "columns": w.norm(dim=0), "elements": w.abs().flatten()}[groups]
    ridge = group_sparse_envelope(w, len(norms), groups)
    torch.testing.assert_close(ridge, w.square().sum() / 2)
    torch.testing.assert_close(group_sparse_envelope(w, 1, groups), norms.sum().square() / 2)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_value_is_the_minimum_over_shares(k):
    w = matrix(7, 3)
    squares = w.square().sum(1).numpy()
    bounds = [(1e-9, 1)] * 7
    found = scipy.optimize.minimize(
        lambda u: 0.5 * (squares / u).sum(),
        [k / 7] * 7,
        jac=lambda u: -0.5 * squares / u**2,
        bounds=bounds,
        constraints={"type": "ineq", "fun": lambda u: k - u.sum(), "jac": lambda u: -1 + 0 * u},
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert group_sparse_envelope(w, k).item() == pytest.approx(found.fun, rel=1e-7)


def test_it_is_the_ridge_at_sparse_weights_and_convex_between_them():
    # The biconjugate: no more than the mean of what its parts cost, in any decomposition.
    w = torch.zeros(6, 3, dtype=torch.float64)
    w[[1, 4]] = matrix(2, 3)
    torch.testing.assert_close(group_sparse_envelope(w, 2), w.square().sum() / 2)
    torch.testing.assert_close(group_sparse_envelope(w, 3), w.square().sum() / 2)
    points = [matrix(6, 3, seed=s) for s in range(6)]
    for a, b in itertools.combinations(points, 2):
        middle = group_sparse_envelope((a + b) / 2, 2)
        assert middle <= (group_sparse_envelope(a, 2) + group_sparse_envelope(b, 2)) / 2


@pytest.mark.parametrize("groups", ["rows", "columns", "elements"])
def test_closed_form_is_the_gradient_of_the_value(groups):
    check_closed_form(envelope(2, groups=groups), [matrix(5, 4), matrix(2, 5), matrix(6, 6)])
    w = matrix(5, 4)[:, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: group_sparse_envelope(w, 2, groups), (w,))


@pytest.mark.parametrize("groups", ["rows", "columns"])
@pytest.mark.parametrize("step", [0.1, 1.0, 10.0])
def test_proximal_step_is_the_minimum(groups, step):
    technique = envelope(2, groups=groups)
    check_proximal(technique, matrix(5, 4), step, lambda u: group_sparse_envelope(u, 2, groups))


def test_proximal_step_of_single_weights_is_the_minimum():
    technique = envelope(5, groups="elements")
    found = check_proximal(
        technique, matrix(4, 4), 0.5, lambda u: group_sparse_envelope(u, 5, "elements")
    )
    assert 5 <= (found != 0).sum() < 16


def test_steps_alone_end_with_k_groups_and_never_fewer():
    technique, w = envelope(3), matrix(8, 4)
    strongest = w.norm(dim=1).topk(3).indices.sort().values
    for _ in range(200):
        (w,) = technique.proximal_form([w], [0.05])
    assert torch.equal((w != 0).any(1).nonzero().flatten(), strongest)


def test_groups_of_zeros_stay_and_survivors_decay_as_under_a_ridge():
    w = torch.zeros(4, 2)
    w[1] = 3.0
    (moved,) = envelope(2).proximal_form([w], [0.25])
    torch.testing.assert_close(moved, w / 1.25)
    (moved,) = envelope(2).proximal_form([torch.zeros(4, 2)], [0.25])
    assert torch.equal(moved, torch.zeros(4, 2))
    assert torch.equal(envelope(2).proximal_form([w], [0.0])[0], w)


class Regression(L.LightningModule):
    """Four outputs from 12 inputs, of which three matter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 4, bias=False)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().sum(1).mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_regression_finds_the_inputs_that_matter_by_strength_alone():
    torch.manual_seed(0)
    x = matrix(64, 12).float()
    true = torch.zeros(4, 12)
    true[:, [2, 5, 11]] = matrix(4, 3, seed=5).float().sign() * torch.tensor([1.0, 0.7, 0.5])
    data = DataLoader(TensorDataset(x, x @ true.T + 0.1 * matrix(64, 4, seed=6).float()), 64)
    module = Regression()
    technique = GroupSparseEnvelope(0.2, k=3, groups="columns", finish=None)
    trainer([technique], max_epochs=150).fit(module, data)
    alive = (module.layer.weight != 0).any(0)
    assert alive.nonzero().flatten().tolist() == [2, 5, 11]


@pytest.mark.parametrize("k", [1, 5, 0.25])
@pytest.mark.parametrize("strength", [1e-4, 0.5])
def test_run_ends_with_exactly_k_groups_whatever_the_strength(k, strength):
    technique = GroupSparseEnvelope(strength, k=k, parameters="net.0.weight", finish=0.5)
    module, _ = fit([technique], module=Host(), max_epochs=4)
    assert (module.net[0].weight != 0).any(1).sum() == (4 if k == 0.25 else k)


def test_weak_strength_without_a_finish_leaves_more():
    technique = GroupSparseEnvelope(1e-4, k=5, parameters="net.0.weight", finish=None)
    module, _ = fit([technique], module=Host(), max_epochs=4)
    assert (module.net[0].weight != 0).any(1).sum() == 16


@pytest.mark.parametrize(
    "arguments",
    [
        {"strength": -1.0},
        {"k": 0},
        {"k": 2.5},
        {"k": -0.5},
        {"k": True},
        {"groups": "layers"},
        {"finish": 1.5},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="GroupSparseEnvelope"):
        GroupSparseEnvelope(**arguments)
