"""Poincaré ball: the official numbers, points that stay inside, and a tree in two dimensions."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.techniques.weights.poincare_projection import (
    PoincareProjection,
    poincare_distance,
    poincare_projection,
)
from tests.engine.simple import trainer

U = torch.tensor([[0.5, -0.25], [0.1, 0.9]], dtype=torch.float64)
V = torch.tensor([[-0.3, 0.2], [0.15, 0.8]], dtype=torch.float64)


def test_equals_the_official_code():
    # facebookresearch/poincare-embeddings@b1364a1, hype/manifolds/poincare.py, in float64.
    u, v = U.clone().requires_grad_(), V.clone().requires_grad_()
    distance = poincare_distance(u, v)
    official = torch.tensor([2.015030673484612, 0.8786775218596888], dtype=torch.float64)
    torch.testing.assert_close(distance.detach(), official, rtol=1e-12, atol=0)
    by_u = [[2.564648770011812, -1.3730938073679715], [-2.8457737697703203, 10.740501002036341]]
    by_v = [[-1.9797124015174608, 1.1685258970748649], [3.6719661545423445, -4.6511571290869735]]
    found = torch.autograd.grad(distance.sum(), (u, v))
    for gradient, expected in zip(found, (by_u, by_v), strict=True):
        torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))
    g = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    riemannian = [[0.1181640625, 0.236328125], [0.0243, -0.0081]]
    expected = torch.tensor(riemannian, dtype=torch.float64)
    torch.testing.assert_close(poincare_projection(U, g)[1], expected)
    far = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    inside = torch.tensor([[0.599994, 0.799992], [0.3, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(poincare_projection(far, far)[0], inside)


def test_distance_from_the_centre_has_a_closed_form():
    r = torch.tensor([0.0, 1e-6, 0.1, 0.6, 0.99], dtype=torch.float64)
    points = torch.stack([r, 0 * r], 1)
    expected = 2 * torch.atanh(r)
    torch.testing.assert_close(poincare_distance(points, torch.zeros(2).double()), expected)


def test_distance_is_symmetric_and_zero_with_a_gradient_where_points_meet():
    torch.testing.assert_close(poincare_distance(U, V), poincare_distance(V, U))
    u = U.clone().requires_grad_()
    distance = poincare_distance(u, U)
    assert not distance.any()
    assert torch.autograd.grad(distance.sum(), u)[0].isfinite().all()


# A balanced tree of 31 nodes; every node is related to all its ancestors.
def ancestors(node):
    while node:
        node = (node - 1) // 2
        yield node


PAIRS = torch.tensor([(n, a) for n in range(1, 31) for a in ancestors(n)])
RELATED = torch.eye(31, dtype=torch.bool)
RELATED[PAIRS[:, 0], PAIRS[:, 1]] = True


class Tree(L.LightningModule):
    def __init__(self, hyperbolic, lr, sparse=False):
        super().__init__()
        self.table = nn.Embedding(31, 2, sparse=sparse)
        self.lr = lr
        nn.init.uniform_(self.table.weight, -1e-3, 1e-3, generator=torch.Generator().manual_seed(0))
        self.distance = poincare_distance if hyperbolic else lambda u, v: (u - v).norm(dim=-1)

    def distances(self, nodes):
        return self.distance(self.table(nodes)[:, None], self.table.weight[None])

    def training_step(self, batch, batch_idx):
        u, v = batch[0].T
        scores = -self.distances(u)
        # All unrelated nodes are negatives, beside the one that is meant.
        blocked = RELATED[u].scatter(1, v[:, None], False)
        return F.cross_entropy(scores.masked_fill(blocked, -torch.inf), v)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

    def mean_rank(self):
        with torch.no_grad():
            table = self.distances(torch.arange(31))
        ranks = []
        for n, a in PAIRS.tolist():
            others = table[n][~RELATED[n]]
            ranks.append(1 + int((others < table[n, a]).sum()))
        return sum(ranks) / len(ranks)


def test_points_stay_in_the_ball_at_a_large_learning_rate():
    module = Tree(hyperbolic=True, lr=200.0)
    data = DataLoader(TensorDataset(PAIRS), batch_size=len(PAIRS))
    trainer([PoincareProjection()], max_epochs=20).fit(module, data)
    norms = module.table.weight.detach().norm(dim=1)
    assert (norms < 1).all()
    assert norms.max() > 0.999


def test_tree_is_ranked_better_in_two_hyperbolic_dimensions_than_in_two_flat_ones():
    data = DataLoader(TensorDataset(PAIRS), batch_size=len(PAIRS))
    ranks = {}
    for hyperbolic, lr in ((True, 30.0), (False, 3.0)):
        module = Tree(hyperbolic, lr)
        callbacks = [PoincareProjection()] if hyperbolic else []
        trainer(callbacks, max_epochs=250).fit(module, data)
        ranks[hyperbolic] = module.mean_rank()
        if hyperbolic:
            norms = module.table.weight.detach().norm(dim=1)
            # The root is nearest to the centre, the leaves are far out.
            assert norms.argmin() == 0
            assert norms[15:].mean() > norms[1:7].mean()
    assert ranks[True] < 0.75 * ranks[False]


def test_sparse_gradients_are_refused():
    data = DataLoader(TensorDataset(PAIRS), batch_size=8)
    module = Tree(True, 1.0, sparse=True)
    module.distances = lambda nodes: poincare_distance(
        module.table(nodes)[:, None], module.table(torch.arange(31))[None]
    )
    with pytest.raises(RegularizationError, match="sparse"):
        trainer([PoincareProjection()], max_epochs=1).fit(module, data)


@pytest.mark.parametrize("arguments", [{"strength": 2.0}, {"eps": 0.0}, {"eps": 1.0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="PoincareProjection"):
        PoincareProjection(**arguments)
