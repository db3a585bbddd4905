"""EnsLoss: the official slopes, what makes a loss calibrated, draws, binary outputs, its claim."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, Signals
from lightning_reg.techniques.outputs.ens_loss import EnsLoss, ens_loss, slopes
from tests.engine.simple import INPUTS, LABELS, Ascent, Host, fit, trainer, weights
from tests.techniques.outputs.digits import Digits, accuracy, split, symmetric_noise

OUTPUTS = torch.tensor([1.5, -0.2, 0.4, 3.0, -2.0, -0.7])
SIGNS = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
DRAWS = torch.tensor([0.3, -1.2, 0.8, -0.1, -2.0, -0.6])
# statmlben/ensLoss@fd37682 losses.py, `ensLoss` on OUTPUTS and SIGNS, with DRAWS in place of its
# normal numbers: the loss by `lam`, and its gradient by the outputs times their number.
OFFICIAL = {
    0.0: (
        0.04927018657326698,
        [
            -0.3658754229545593,
            -0.9048384428024292,
            1.0000009536743164,
            -0.04511275887489319,
            0.15059810876846313,
            -1.0000009536743164,
        ],
    ),
    0.5: (
        0.10508245974779129,
        [
            -0.3266676664352417,
            -0.9025009870529175,
            1.0000009536743164,
            -9.999999974752427e-07,
            0.08000098913908005,
            -1.0000009536743164,
        ],
    ),
    -0.5: (
        0.008176599629223347,
        [
            -0.39447838068008423,
            -0.9070306420326233,
            1.0000009536743164,
            -0.08333433419466019,
            0.1953134983778,
            -1.0000009536743164,
        ],
    ),
}


@pytest.mark.parametrize("box_cox", OFFICIAL)
def test_value_and_gradient_are_those_of_the_official_code(box_cox):
    value, gradient = OFFICIAL[box_cox]
    f = OUTPUTS.clone().requires_grad_()
    loss = ens_loss(SIGNS * f, DRAWS, box_cox).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(6 * f.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("box_cox", [-1.0, -0.3, 0.0, 0.7, 1.0])
def test_slopes_are_those_of_a_convex_calibrated_loss_that_is_bounded_below(box_cox):
    draws = torch.Generator().manual_seed(0)
    z = torch.cat([3 * torch.randn(200, generator=draws), torch.zeros(1)]).double()
    found = slopes(z, torch.randn(201, generator=draws).double(), box_cox)
    order = z.argsort()
    assert (found < 0).all()
    assert (found[order].diff() >= 0).all()
    assert (found >= -1 - 1e-5).all()
    beyond = z > 1
    assert (found[beyond] * z[beyond] >= -1 - 1e-5 * z[beyond]).all()
    assert found.unique().numel() > 50


def test_equal_margins_have_equal_slopes():
    found = slopes(torch.zeros(6), DRAWS)
    assert found.unique().numel() == 1


def test_a_part_of_a_batch_has_the_slopes_of_the_whole():
    z = SIGNS * OUTPUTS
    whole = slopes(z, DRAWS)
    parts = [slopes(part, DRAWS, batch=z) for part in z.split(2)]
    torch.testing.assert_close(torch.cat(parts), whole)


# ---------------------------------------------------------------------- training


class Drawn(EnsLoss):
    """Keeps what its steps drew."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lambdas, self.margins, self.values = [], [], []

    def losses(self, step, logits, distribution):
        side = 2 * distribution - 1
        self.margins.append(side.detach() * logits.detach())
        self.lambdas.append(float(self._lambda(step)))
        self.draws = torch.randn(logits.numel(), generator=step.rng(self, shared=True))
        self.values.append(super().losses(step, logits, distribution))
        return self.values[-1]


def test_lambda_is_drawn_once_a_period_and_not_before_the_first():
    technique = Drawn(box_cox=0.25, period=2)
    fit([technique], max_epochs=6)
    by_epoch = np.array(technique.lambdas).reshape(6, 4)
    assert (by_epoch == by_epoch[:, :1]).all()
    first, second, third, fourth, fifth, sixth = by_epoch[:, 0]
    assert first == 0.25
    assert second == third
    assert fourth == fifth
    assert len({first, second, fourth, sixth}) == 4
    assert all(-1 <= value <= 1 for value in by_epoch[:, 0])


def test_every_batch_draws_another_loss():
    technique = Drawn()
    fit([technique], module=Host(lr=0.0), max_epochs=2)
    assert not torch.equal(technique.values[0], technique.values[4])


def test_a_second_pass_has_the_loss_of_the_first():
    technique = Drawn()
    fit([technique, Ascent(1e-12)], max_epochs=1)
    # The first step has one more pass, as a check of the module.
    torch.testing.assert_close(technique.values[3], technique.values[4])


def test_more_classes_are_each_against_the_rest():
    technique = Drawn()
    fit([technique], max_epochs=1, limit_train_batches=1)
    z = technique.margins[0]
    expected = (slopes(z, technique.draws) * z).sum(1)
    assert z.shape == (16, 4)
    torch.testing.assert_close(technique.values[0].detach(), expected)


class Binary(Host):
    """One output column and the binary cross-entropy."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return F.binary_cross_entropy_with_logits(logits.squeeze(1), batch[1].float())


class Slopes(EnsLoss):
    """Keeps margins and draws of a step."""

    def losses(self, step, logits, distribution):
        generator = step.rng(self, shared=True)
        self.draws = torch.randn(len(logits), generator=generator)
        return super().losses(step, logits, distribution)


def test_a_binary_output_of_one_column_follows_the_slopes():
    technique = Slopes(signals=Signals(logits=lambda step: F.pad(step.records[""][-1], (1, 0))))
    labels = LABELS % 2
    loader = DataLoader(TensorDataset(INPUTS, labels), batch_size=64)
    module, plain = Binary(), Binary()
    plain.load_state_dict(module.state_dict())
    trainer([technique], max_epochs=1).fit(module, loader)
    z = (2.0 * labels - 1) * plain(INPUTS).squeeze(1)
    slope = -technique.draws.exp().clamp_max(1.0).sort(descending=True).values
    by_rank = slope[z.detach().argsort().argsort()] / z.detach().clamp_min(1.0)
    (by_rank * z).mean().backward()
    moved = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in plain.parameters()])
    torch.testing.assert_close(weights(module), moved, rtol=0, atol=1e-6)


def held_out(callbacks, seed):
    """Accuracy on whether a digit is at least 5, after 200 samples of which 20 % lie."""
    (x, y), (held, labels) = split(seed, 200)
    y = symmetric_noise((y >= 5).long(), 0.2, seed, classes=2)
    module = Digits(seed, classes=2)
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    trainer(callbacks, max_epochs=40, log_every_n_steps=1000).fit(module, loader)
    with torch.no_grad():
        return accuracy(module(held), (labels >= 5).long())


def test_overfits_less_than_the_cross_entropy():
    # Four seeds: 0.74, 0.85, 0.74, 0.78 with the cross-entropy, and 0.76, 0.86, 0.75, 0.83.
    ours = [held_out([EnsLoss()], seed) for seed in range(4)]
    plain = [held_out([], seed) for seed in range(4)]
    assert np.mean(ours) > np.mean(plain) + 0.01


@pytest.mark.parametrize("arguments", [{"box_cox": 1.5}, {"period": 0}, {"strength": 1.5}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="EnsLoss"):
        EnsLoss(**arguments)
