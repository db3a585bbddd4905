"""L1: signs, soft thresholds, and the lasso's closed form on an orthonormal design."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.l1_penalty import L1Penalty, l1_penalty
from tests.engine.simple import trainer
from tests.techniques.weights.penalty import check_closed_form, check_proximal, matrix


def test_value_and_gradient_are_absolute_values_and_signs():
    w = torch.tensor([[1.5, -2.0], [0.0, 0.25]])
    values, (gradient,) = L1Penalty().closed_form([w])
    assert values.tolist() == [3.75]
    assert gradient.tolist() == [[1.0, -1.0], [0.0, 1.0]]


def test_closed_form_is_the_gradient_of_the_value():
    check_closed_form(L1Penalty(), [matrix(), matrix(2, 5), matrix(seed=1)])


def test_proximal_step_is_the_minimum_and_has_exact_zeros():
    found = check_proximal(L1Penalty(mode="proximal"), matrix(), 0.4, l1_penalty)
    assert 0 < (found == 0).sum() < found.numel()


class Regression(L.LightningModule):
    """Least squares on a design with orthonormal columns."""

    x = torch.linalg.qr(matrix(16, 6)).Q.float() * 4
    y = x @ torch.tensor([2.0, -1.0, 0.3, 0.1, 0.0, -0.05]).unsqueeze(1)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1, bias=False)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def train(technique):
    torch.manual_seed(0)
    module = Regression()
    data = DataLoader(TensorDataset(module.x, module.y), batch_size=16)
    trainer([technique], max_epochs=60).fit(module, data)
    return module.layer.weight.detach().flatten()


def test_lasso_on_an_orthonormal_design_is_the_soft_threshold():
    # X^T X / n = I: the solution is the soft threshold of the least squares solution.
    expected = torch.tensor([1.8, -0.8, 0.1, 0.0, 0.0, 0.0])
    torch.testing.assert_close(train(L1Penalty(0.2, mode="proximal")), expected, atol=1e-5, rtol=0)


def test_subgradient_comes_near_but_leaves_no_exact_zeros():
    found = train(L1Penalty(0.2))
    assert (found != 0).all()
    # Around zero it jumps by no more than the step, lr * strength.
    assert found[3:].abs().max() <= 0.1 + 1e-6


def test_negative_strength_is_refused():
    with pytest.raises(ArgumentError, match="L1Penalty"):
        L1Penalty(-0.1)
