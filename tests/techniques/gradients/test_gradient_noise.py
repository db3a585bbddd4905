"""Gradient noise: its variance, its fading, and a saddle that noise alone leaves."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.gradients.gradient_noise import GradientNoise, gradient_noise
from tests.engine.simple import Host, fit, trainer
from tests.techniques.weights.penalty import Still


def noise(step, eta=0.3, gamma=0.55, size=40_000):
    zeros = [torch.zeros(size // 2), torch.zeros(2, size // 4)]
    generator = torch.Generator().manual_seed(0)
    return gradient_noise(zeros, step, generator, eta, gamma)


@pytest.mark.parametrize("step", [0, 1, 99])
def test_variance_falls_as_the_paper_says(step):
    first, second = noise(step)
    expected = 0.3 / (1 + step) ** 0.55
    # A variance of 20,000 normal numbers is off by 1 % (one deviation).
    for part in (first, second):
        assert part.var().item() == pytest.approx(expected, rel=0.05)
        assert part.mean().abs() < 5 * (expected / 20_000) ** 0.5
    assert torch.corrcoef(torch.stack([first, second.flatten()]))[0, 1].abs() < 0.04


def test_noise_is_added():
    generator = torch.Generator().manual_seed(0)
    (found,) = gradient_noise([torch.full((3,), 7.0)], 0, generator, 0.0, 0.5)
    assert found.tolist() == [7.0] * 3


def test_every_step_has_noise_of_its_own_and_the_log_its_size():
    class Watched(GradientNoise):
        seen = []

        def edit_gradients(self, update):
            value = super().edit_gradients(update)
            Watched.seen.append(update.module.net[0].weight.grad.clone())
            return value

    _, run = fit([Watched(eta=1.0, gamma=1.0)], module=Still(), max_epochs=1)
    stds = [float(g.std()) for g in Watched.seen]
    assert stds == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5], rel=0.25)
    # From step to step: the correlation of 128 independent pairs has a deviation of 0.09.
    pair = torch.stack([g.flatten() for g in Watched.seen[:2]])
    assert torch.corrcoef(pair)[0, 1].abs() < 0.4
    assert run.callback_metrics["reg/watched"] == pytest.approx(0.5)


class Saddle(L.LightningModule):
    """Weights of zeros: no gradient at all, in any layer but the last bias."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.2)


def test_noise_leaves_the_saddle_of_zero_weights_where_plain_training_stays():
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, x[:, :1] - x[:, 1:]), batch_size=64)
    errors = []
    for callbacks in ([], [GradientNoise(eta=0.01)]):
        module = Saddle()
        trainer(callbacks, max_epochs=150).fit(module, data)
        errors.append(float((module.net(x) - data.dataset.tensors[1]).square().mean()))
    assert errors[0] > 1.5
    assert errors[1] < 0.5


@pytest.mark.parametrize("arguments", [{"strength": 2.0}, {"eta": -1.0}, {"gamma": -0.1}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="GradientNoise"):
        GradientNoise(**arguments)


def test_no_noise_with_a_variance_of_zero():
    ours, _ = fit([GradientNoise(eta=0.0)], module=Host())
    plain, _ = fit(module=Host())
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
