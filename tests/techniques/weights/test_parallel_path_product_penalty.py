"""Parallel path products: rescaling, the nuclear norm at depth two, and branches that vanish."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.parallel_path_product_penalty import (
    ParallelPathProductPenalty,
    parallel_path_product_penalty,
)
from tests.engine.simple import fit, trainer
from tests.techniques.weights.penalty import matrix


def branch(depth):
    return [matrix(3, 4, seed=s) * (s + 1) for s in range(depth)]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_value_is_the_mean_power_or_the_product_of_norms(depth):
    norms = [w.norm() for w in branch(depth)]
    power = sum(n**depth for n in norms) / depth
    torch.testing.assert_close(parallel_path_product_penalty(branch(depth)), power)
    product = torch.stack(norms).prod()
    torch.testing.assert_close(parallel_path_product_penalty(branch(depth), "product"), product)
    # By the inequality of means, and equal where all norms are.
    assert product <= power * (1 + 1e-12)
    even = [w / w.norm() * 1.7 for w in branch(depth)]
    torch.testing.assert_close(
        parallel_path_product_penalty(even), parallel_path_product_penalty(even, "product")
    )


def test_rescaling_layers_raises_the_power_and_leaves_the_product():
    a, b, c = branch(3)
    a, b, c = (w / w.norm() for w in (a, b, c))
    moved = [3 * a, b / 3, c]
    torch.testing.assert_close(parallel_path_product_penalty(moved, "product").item(), 1.0)
    assert parallel_path_product_penalty(moved) > 9


def test_linear_branches_of_rank_one_pay_the_nuclear_norm_of_their_sum():
    # At depth two, at the best factorization: one singular vector a branch, evenly spread.
    w = matrix(5, 4)
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    total = 0.0
    for i in range(4):
        pair = [left[:, i : i + 1] * values[i].sqrt(), values[i].sqrt() * right[i : i + 1]]
        total += parallel_path_product_penalty(pair).item()
    assert total == pytest.approx(torch.linalg.matrix_norm(w, "nuc").item())


@pytest.mark.parametrize("form", ["power", "product"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_closed_form_is_the_gradient_of_the_value(form, depth):
    paths = [branch(depth), [w * 2 for w in branch(2)]]
    values, gradients = ParallelPathProductPenalty(form=form).closed_form(paths)
    for path, value, found in zip(paths, values, gradients, strict=True):
        leaves = [w.clone().requires_grad_() for w in path]
        expected = parallel_path_product_penalty(leaves, form)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(found, list(torch.autograd.grad(expected, leaves)))


@pytest.mark.parametrize("form", ["power", "product"])
def test_branch_of_zeros_has_no_gradient(form):
    path = [torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(1, 2)]
    values, (gradients,) = ParallelPathProductPenalty(form=form).closed_form([path])
    assert values.tolist() == [0]
    assert all(torch.equal(g, w) for g, w in zip(gradients, path, strict=True))


class Parallel(L.LightningModule):
    """Each branch sees two inputs of its own."""

    def __init__(self, branches=4):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False), nn.ReLU(),
                nn.Linear(3, 1, bias=False),
            )
            for _ in range(branches)
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        parts = batch[0].split(2, 1)
        total = sum(b(x) for b, x in zip(self.branches, parts, strict=True))
        return (total - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


def sizes(callbacks):
    x = matrix(64, 8).float()
    noise = 0.3 * matrix(64, 1, seed=1).float()
    data = DataLoader(TensorDataset(x, x[:, 2:3].relu() + noise), batch_size=64)
    module = Parallel()
    trainer(callbacks, max_epochs=200).fit(module, data)
    return torch.stack(
        [
            parallel_path_product_penalty([b[i].weight.detach() for i in (0, 2, 4)], "product")
            for b in module.branches
        ]
    )


def test_branches_that_are_not_needed_vanish():
    free, held = sizes([]), sizes([ParallelPathProductPenalty(0.1)])
    assert free.min() > 1
    # The branch that sees what matters keeps about the size of the function.
    assert held[1] > 0.7
    assert held.sum() - held[1] < 0.2 * held[1]


def test_branches_are_found_by_name_and_frozen_layers_count():
    module = Parallel(3)
    module.branches[1][0].weight.requires_grad_(False)
    technique = ParallelPathProductPenalty()
    paths = technique.find_paths(module)
    assert paths == [tuple(f"branches.{b}.{i}.weight" for i in (0, 2, 4)) for b in range(3)]
    before = module.branches[1][0].weight.clone()
    data = DataLoader(TensorDataset(torch.randn(4, 6), torch.randn(4, 1)), batch_size=4)
    trainer([technique], max_epochs=1).fit(module, data)
    assert torch.equal(module.branches[1][0].weight, before)


@pytest.mark.parametrize("arguments", [{"strength": -1.0}, {"form": "sum"}, {"branches": "("}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="ParallelPathProductPenalty"):
        ParallelPathProductPenalty(**arguments)


def test_branches_that_are_not_there_are_refused_before_training():
    with pytest.raises(ArgumentError, match="no_such"):
        fit([ParallelPathProductPenalty(branches="no_such")])
