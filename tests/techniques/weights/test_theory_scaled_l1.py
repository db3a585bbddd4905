"""Theory-scaled L1: the rates, the soft threshold, and a mixture whose support it finds."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.theory_scaled_l1 import TheoryScaledL1, theory_scaled_l1
from tests.engine.simple import Host, fit, trainer
from tests.techniques.weights.penalty import check_closed_form, check_proximal, matrix


def test_lassos_rate_falls_with_samples_and_grows_with_the_log_of_inputs():
    w = matrix(4, 9)
    assert theory_scaled_l1(w, 50).item() == pytest.approx(
        math.sqrt(2 * math.log(9) / 50) * w.abs().sum().item()
    )
    rates = [TheoryScaledL1(samples=n).rate(p) for n, p in ((50, 9), (200, 9), (50, 81))]
    assert rates[1] == pytest.approx(rates[0] / 2)
    assert rates[2] == pytest.approx(rates[0] * 2**0.5)


def test_bound_of_the_mixture():
    technique = TheoryScaledL1(rule="mixture", samples=100, experts=3, outputs=2, bound=0.5)
    expected = 3 * 0.5 / 10 * (2 * math.log(100) * math.sqrt(math.log(2 * 7 + 1)) + 1)
    assert technique.rate(7) == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["lasso", "mixture"])
def test_closed_form_and_proximal_step_use_each_layers_rate(rule):
    technique = TheoryScaledL1(samples=30, rule=rule)
    check_closed_form(technique, [matrix(), matrix(2, 5), matrix(seed=1)])
    rate = technique.rate(3)
    check_proximal(technique, matrix(), 0.4 / rate, lambda u: rate * u.abs().sum())


def test_training_set_is_counted_and_must_be_countable():
    technique = TheoryScaledL1()
    fit([technique], max_epochs=1)
    assert technique.rate(8) == pytest.approx(math.sqrt(2 * math.log(8) / 64))

    class Endless(IterableDataset):
        def __iter__(self):
            yield torch.zeros(8), torch.tensor(0)

    with pytest.raises(ArgumentError, match="samples=1000"):
        trainer([TheoryScaledL1()], max_epochs=1).fit(Host(), DataLoader(Endless(), batch_size=1))


class Mixture(L.LightningModule):
    """Two linear experts under a softmax gate, of which each reads few of 20 inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(20, 2)
        self.experts = nn.Linear(20, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        errors = (self.experts(x) - y).square() / (2 * 0.3**2)
        # The likelihood of a mixture of Gaussians, in units of their variance.
        return -(0.3**2) * (self.gate(x).log_softmax(1) - errors).logsumexp(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.3)


def test_mixture_of_experts_recovers_its_support():
    x = matrix(300, 20).float()
    gate = x[:, 0] > 0
    y = torch.where(gate, 2 * x[:, 1], -2 * x[:, 2])[:, None] + 0.3 * matrix(300, 1, seed=1).float()
    data = DataLoader(TensorDataset(x, y), batch_size=300)
    module = Mixture()
    with torch.no_grad():
        # Which expert is which is decided by the start.
        module.experts.weight.zero_()
        module.experts.weight[0, 1], module.experts.weight[1, 2] = 0.5, -0.5
    technique = TheoryScaledL1(0.3, parameters=r"weight")
    trainer([technique], max_epochs=400).fit(module, data)
    experts, gates = module.experts.weight.detach(), module.gate.weight.detach()
    assert experts[0].abs().argmax() == 1
    assert experts[1].abs().argmax() == 2
    assert gates.abs().amax(0).argmax() == 0
    # Of 74 weights that mean nothing nearly all are exactly zero, and those left are small.
    rest = torch.cat([experts[0, 3:], experts[1, 3:], gates[:, 3:].flatten()])
    assert (rest == 0).float().mean() > 0.85
    assert rest.abs().max() < 0.1 * experts.abs().max()


@pytest.mark.parametrize(
    "arguments",
    [{"strength": -1.0}, {"rule": "bayes"}, {"samples": 1}, {"experts": 0}, {"bound": 0.0}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="TheoryScaledL1"):
        TheoryScaledL1(**arguments)
