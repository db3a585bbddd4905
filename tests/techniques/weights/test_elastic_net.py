"""Elastic net: scikit-learn's objective, and its solution."""

import lightning as L
import pytest
import sklearn.linear_model
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.elastic_net import ElasticNet, elastic_net
from tests.engine.simple import trainer
from tests.techniques.weights.penalty import check_closed_form, check_proximal, matrix


def test_value_weighs_both_parts():
    w = torch.tensor([[3.0, -1.0]])
    assert elastic_net(w, 0.25) == pytest.approx(0.25 * 4 + 0.375 * 10)
    assert elastic_net(w, 1.0) == 4
    assert elastic_net(w, 0.0) == 5


def test_closed_form_is_the_gradient_of_the_value():
    check_closed_form(ElasticNet(l1_ratio=0.3), [matrix(), matrix(2, 5), matrix(seed=1)])


def test_proximal_step_is_the_minimum_and_has_exact_zeros():
    found = check_proximal(ElasticNet(l1_ratio=0.3), matrix(), 1.0, lambda u: elastic_net(u, 0.3))
    assert 0 < (found == 0).sum() < found.numel()


class Regression(L.LightningModule):
    def __init__(self, columns):
        super().__init__()
        self.layer = nn.Linear(columns, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.2)


def test_training_ends_at_scikit_learns_solution():
    x = matrix(40, 6)
    x[:, 1] = x[:, 0] + 0.5 * matrix(40, 1, seed=1)[:, 0]
    y = x @ torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    options = {"alpha": 0.3, "l1_ratio": 0.6, "fit_intercept": False, "tol": 1e-10}
    peer = sklearn.linear_model.ElasticNet(**options)
    expected = torch.from_numpy(peer.fit(x.numpy(), y.numpy()).coef_)
    module = Regression(6)
    data = DataLoader(TensorDataset(x, y.unsqueeze(1)), batch_size=40)
    technique = ElasticNet(0.3, l1_ratio=0.6, mode="proximal")
    trainer([technique], max_epochs=200, precision="64-true").fit(module, data)
    found = module.layer.weight.detach().flatten()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(found == 0, expected == 0)
    assert (found[:2] > 0.3).all()


@pytest.mark.parametrize("arguments", [{"strength": -1.0}, {"l1_ratio": 1.5}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="ElasticNet"):
        ElasticNet(**arguments)
