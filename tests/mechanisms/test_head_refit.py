"""The second stage that fits the classifier: its optimum, its data, and what it leaves alone."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import MissingSignalError, RegularizationError, UnsupportedError
from lightning_reg.mechanisms.head_refit import Head, HeadRefit, refit_head
from tests.engine.simple import INPUTS, LABELS, trainer


class Kept(HeadRefit):
    """Keeps the rows, and makes the head a constant."""

    def __init__(self, head="head", data="train", **settings):
        super().__init__(head=head, data=data, **settings)

    def new_head(self, rows, head):
        self.rows, self.old = rows, head
        return Head(torch.full_like(head.weight, 0.5), head.bias)


class Net(L.LightningModule):
    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 4, bias=bias)

    def forward(self, x):
        return self.head(self.encoder(x).relu())

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return F.cross_entropy(logits.reshape(-1, 4), y.reshape(-1))

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def _fit(technique, inputs=INPUTS, labels=LABELS, module=None, held_out=None):
    module = Net() if module is None else module
    data = DataLoader(TensorDataset(inputs, labels), 16, shuffle=True)
    trainer([technique], max_epochs=1).fit(module, data, held_out)
    return module


@pytest.mark.parametrize("weighted", [False, True])
def test_fit_is_the_optimum_that_scikit_learn_finds(weighted):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (90,), generator=generator)
    weights = torch.rand(90, dtype=torch.float64, generator=generator) if weighted else None
    start = Head(torch.randn(3, 5, generator=generator), torch.zeros(3))
    found = refit_head(start, x, y, weight_decay=0.02, sample_weights=weights)
    peer = LogisticRegression(C=1 / (90 * 0.02), tol=1e-10, max_iter=5000)
    peer.fit(x.numpy(), y.numpy(), sample_weight=None if weights is None else weights.numpy())
    # A shift of all biases changes nothing.
    bias = found.bias - found.bias.mean()
    np.testing.assert_allclose(found.weight, peer.coef_, atol=1e-5)
    np.testing.assert_allclose(bias, peer.intercept_ - peer.intercept_.mean(), atol=1e-5)


def test_rows_are_what_the_head_is_given_in_order_and_without_dropout():
    technique = Kept()
    module = _fit(technique)
    expected = module.eval().encoder(INPUTS).relu().detach().double()
    assert torch.equal(technique.rows.features, expected)
    assert torch.equal(technique.rows.labels, LABELS)
    assert float(module.head.weight.unique()) == 0.5


def test_positions_are_rows_and_ignored_ones_are_left_out():
    inputs, labels = INPUTS.view(16, 4, 8), LABELS.view(16, 4).clone()
    labels[3, 1] = -100
    technique = Kept()
    module = _fit(technique, inputs, labels)
    kept = labels.reshape(-1) >= 0
    assert torch.equal(technique.rows.labels, labels.reshape(-1)[kept])
    features = module.eval().encoder(INPUTS).relu().detach().double()
    torch.testing.assert_close(technique.rows.features, features[kept])


def test_rows_that_are_not_finite_are_left_out():
    inputs = INPUTS.clone()
    technique = Kept(dataloader=DataLoader(TensorDataset(inputs, LABELS), 16))
    inputs[5, 2] = torch.inf
    _fit(technique)
    assert len(technique.rows.labels) == 63


def test_held_out_data_are_used_where_asked_for():
    technique = Kept(data="validation")
    _fit(technique, held_out=DataLoader(TensorDataset(INPUTS[:10], LABELS[:10]), 10))
    assert torch.equal(technique.rows.labels, LABELS[:10])
    with pytest.raises(RegularizationError, match="no validation data"):
        _fit(Kept(data="validation"))


def test_a_head_without_a_bias_gets_none():
    class Fitted(Kept):
        def new_head(self, rows, head):
            return self.fitted(rows, head)

    module = _fit(Fitted(weight_decay=0.1), module=Net(bias=False))
    features = module.eval().encoder(INPUTS).relu().detach()
    weight = module.head.weight.detach().requires_grad_()
    loss = F.cross_entropy(features @ weight.t(), LABELS) + 0.05 * weight.square().sum()
    (slope,) = torch.autograd.grad(loss, weight)
    assert float(slope.abs().max()) < 1e-6


def test_heads_that_cannot_be_fitted_are_refused_with_those_that_can():
    module = Net()
    nn.utils.parametrizations.spectral_norm(module.head)
    with pytest.raises(UnsupportedError, match=r"linear layers are encoder\.0, head"):
        _fit(Kept(), module=module)
    with pytest.raises(UnsupportedError, match="'encoder' is a Sequential"):
        _fit(Kept(head="encoder"))


def test_a_head_that_forward_does_not_call_is_named():
    class Around(Net):
        def forward(self, x):
            return F.linear(self.encoder(x), self.head.weight)

    with pytest.raises(MissingSignalError, match="does not call it"):
        _fit(Kept(), module=Around())


def test_held_out_batches_come_in_the_precision_of_the_run():
    technique = Kept()
    module = Net()
    data = DataLoader(TensorDataset(INPUTS, LABELS), 16)
    trainer([technique], max_epochs=1, precision="64-true").fit(module, data)
    expected = module.double().eval().encoder(INPUTS.double()).relu().detach()
    torch.testing.assert_close(technique.rows.features, expected, rtol=1e-14, atol=0)
