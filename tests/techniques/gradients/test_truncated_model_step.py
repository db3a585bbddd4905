"""Truncated model: the Polyak step where plain SGD would pass the bound, and SGD elsewhere."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.gradients.truncated_model_step import (
    TruncatedModelStep,
    truncated_model_step,
)
from tests.engine.simple import Host, fit, trainer, weights


class Quadratic(L.LightningModule):
    """``a / 2 w^2 + floor`` from 1."""

    def __init__(self, lr, a=4.0, floor=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.lr, self.a, self.floor = lr, a, floor

    def training_step(self, batch, batch_idx):
        return self.a / 2 * self.w.square().sum() + self.floor

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def run(module, callbacks, steps=5, **options):
    data = DataLoader(TensorDataset(torch.zeros(steps, 1)), batch_size=1)
    trained = trainer(callbacks, max_epochs=1, **options)
    trained.fit(module, data)
    return float(module.w.detach()), trained


def test_factor_is_the_room_over_the_fall():
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([2.0])]
    loss = torch.tensor(1.5)
    # 0.1 * 25 + 0.5 * 4 = 4.5 of fall for a room of 1.
    assert truncated_model_step(loss, gradients, [0.1, 0.5], 0.5) == pytest.approx(1 / 4.5)
    assert truncated_model_step(loss, gradients, [0.001, 0.01]) == 1
    assert truncated_model_step(torch.tensor(-1.0), gradients, [0.1, 0.1]) == 0
    assert truncated_model_step(torch.tensor(0.0), [torch.zeros(2)], [0.1]) == 1


def test_quadratic_is_halved_every_step_where_sgd_diverges():
    # (a/2 w^2) / (a w)^2 * a w = w / 2, whatever a and the learning rate.
    found, trained = run(Quadratic(lr=10.0), [TruncatedModelStep()])
    assert found == pytest.approx(2**-5, rel=1e-6)
    plain, _ = run(Quadratic(lr=10.0), [])
    assert abs(plain) > 1e6
    # The factor of the last step, at any w: (a/2) / (lr a^2).
    factor = trained.callback_metrics["reg/truncated_model_step"]
    assert factor == pytest.approx(1 / (2 * 4 * 10.0), rel=1e-5)


def test_bound_moves_the_step():
    found, _ = run(Quadratic(lr=10.0, floor=3.0), [TruncatedModelStep(lower_bound=3.0)])
    assert found == pytest.approx(2**-5, rel=1e-5)


def test_small_steps_are_those_of_sgd():
    ours, _ = fit([TruncatedModelStep()], module=Host(lr=1e-3))
    plain, _ = fit(module=Host(lr=1e-3))
    assert torch.equal(weights(ours), weights(plain))


def test_micro_batches_have_the_factor_of_their_mean():
    class Shifted(Quadratic):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + batch_idx % 2

    found, trained = run(Shifted(lr=10.0), [TruncatedModelStep()], 2, accumulate_grad_batches=2)
    # Losses 2 and 3 with gradients 4 each: (2.5 / (10 * 16)) * 10 * 4 = 0.625.
    assert found == pytest.approx(1 - 0.625)
    assert trained.callback_metrics["reg/truncated_model_step"] == pytest.approx(2.5 / 160)


def test_each_parameter_counts_with_its_own_rate():
    class Groups(Quadratic):
        def __init__(self):
            super().__init__(10.0)
            self.v = nn.Parameter(torch.ones(1))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.v.square().sum() / 2

        def configure_optimizers(self):
            return torch.optim.SGD([{"params": [self.w]}, {"params": [self.v], "lr": 1.0}], 10.0)

    module = Groups()
    run(module, [TruncatedModelStep()], 1)
    factor = 2.5 / (10 * 16 + 1)
    assert float(module.w.detach()) == pytest.approx(1 - 10 * 4 * factor)
    assert float(module.v.detach()) == pytest.approx(1 - factor)


@pytest.mark.parametrize(
    "arguments", [{"strength": 2.0}, {"lower_bound": float("inf")}, {"lower_bound": "low"}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="TruncatedModelStep"):
        TruncatedModelStep(**arguments)
