"""DCO: the official gradient, its exact optima, the factor's limits, sequences, pass@N."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.techniques.outputs.direct_coverage_optimization import (
    DirectCoverageOptimization,
    direct_coverage_optimization,
    overconfidence_factor,
    pass_at_n_loss,
)
from tests.engine.simple import fit, trainer
from tests.techniques.outputs.noisy import Noisy, noisy_data

# Two sequences of three tokens, of which the first has two with a label.
LOGITS = torch.tensor(
    [
        [[2.0, -1.0, 0.5], [0.0, -3.0, 1.0], [-1.0, 0.3, 0.2]],
        [[4.0, 1.0, -2.0], [0.1, 0.2, 0.7], [1.5, 0.0, -0.5]],
    ],
    dtype=torch.float64,
)
TOKENS = torch.tensor([[0, 2, -100], [1, 2, 0]])
# allanraventos/refine@31a9e6e refine/training/loss_functions.py, `custom_loss_function2` on LOGITS
# and TOKENS (its own shift by one undone): the loss is the factor times the cross-entropy.
OFFICIAL = {
    4: (
        2.066769262179191,
        [
            [-0.020487819862145037, 0.0037375012700020796, 0.01675031859214296],
            [0.02535981751865037, 0.0012625909685975998, -0.026622408487247968],
            [0.0, 0.0, 0.0],
            [0.4636188042135855, -0.46476800033367327, 0.0011491961200878794],
            [0.12422058376335351, 0.13728497660163833, -0.2615055603649919],
            [-0.12873161167550287, 0.08013019290807033, 0.04860141876743247],
        ],
    ),
    16: (
        1.820262373306427,
        [
            [-3.4601135286909337e-06, 6.312130229009036e-07, 2.8289005057900308e-06],
            [4.282927528250361e-06, 2.1323440566360728e-07, -4.496161933913968e-06],
            [0.0, 0.0, 0.0],
            [0.419330025463745, -0.42036944067710474, 0.0010394152133598176],
            [0.11235398581592285, 0.12417035765364177, -0.2365243434695647],
            [-0.11643408229190141, 0.07247548099251863, 0.04395860129938274],
        ],
    ),
}


class Step:
    """As much of a step as the losses need."""

    is_rerun, logging = True, False

    def __init__(self, targets, classes=3):
        self.targets = targets
        self.target_distribution = torch.zeros(1, classes)


def sequence_loss(logits, tokens, n):
    kept = tokens >= 0
    technique = DirectCoverageOptimization(n=n, unit="sequence")
    labels = F.one_hot(tokens[kept], 3).to(logits)
    return technique.losses(Step(tokens), logits[kept], labels).mean()


@pytest.mark.parametrize("n", OFFICIAL)
def test_gradient_of_sequences_is_that_of_the_official_code(n):
    z = LOGITS.clone().requires_grad_()
    sequence_loss(z, TOKENS, n).backward()
    # Its series for N p < 0.1 (the second sequence) is good to 2e-4.
    expected = torch.tensor(OFFICIAL[n][1], dtype=torch.float64).view(2, 3, 3)
    torch.testing.assert_close(z.grad, expected, rtol=2e-4, atol=1e-12)
    nll = -LOGITS.log_softmax(-1).gather(2, TOKENS.clamp_min(0)[..., None])[..., 0]
    nll = (nll * (TOKENS >= 0)).sum(1)
    value = (nll * overconfidence_factor(nll, n)).mean()
    assert float(value) == pytest.approx(OFFICIAL[n][0], rel=2e-4)


def test_a_sequence_has_the_chance_of_all_of_its_tokens():
    p = LOGITS.softmax(-1).gather(2, TOKENS.clamp_min(0)[..., None])[..., 0].numpy()
    p = np.where(TOKENS.numpy() >= 0, p, 1.0).prod(1)
    expected = -np.log(1 - (1 - p) ** 5).mean()
    assert float(sequence_loss(LOGITS, TOKENS, 5)) == pytest.approx(expected, rel=1e-12)


def test_a_sequence_without_a_label_does_not_count():
    tokens = torch.cat([TOKENS, torch.full((1, 3), -100)])
    padded = sequence_loss(torch.cat([LOGITS, LOGITS[:1]]), tokens, 5)
    torch.testing.assert_close(padded, sequence_loss(LOGITS, TOKENS, 5))


def test_one_draw_is_the_cross_entropy():
    rows, labels = LOGITS.view(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = F.cross_entropy(rows, labels, reduction="none")
    assert torch.equal(direct_coverage_optimization(rows, labels, 1), expected)


def test_factor_has_the_papers_values():
    nll = -torch.tensor([0.125, 0.5, 0.99], dtype=torch.float64).log()
    expected = torch.tensor([0.598265, 0.031373, 7.92e-14], dtype=torch.float64)
    torch.testing.assert_close(overconfidence_factor(nll, 8), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_exact(dtype):
    nll = torch.tensor([5000.0, 1e-30, 0.0], dtype=dtype, requires_grad=True)
    value = pass_at_n_loss(nll, 16)
    (slope,) = torch.autograd.grad(value.sum(), nll)
    # p = 0: log N less than the cross-entropy, and its gradient; p = 1: neither.
    expected = torch.tensor([5000.0 - np.log(16), 0.0, 0.0], dtype=dtype)
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(slope, torch.tensor([1.0, 0.0, 0.0], dtype=dtype))


def test_slope_is_the_derivative_of_the_value_and_so_is_the_next():
    nll = torch.tensor([0.05, 0.5, 2.0, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: pass_at_n_loss(s, 5), (nll,))
    assert torch.autograd.gradgradcheck(lambda s: pass_at_n_loss(s, 5), (nll,))


def test_a_masked_class_and_a_sure_row_have_finite_derivatives():
    logits = torch.tensor([[90.0, 0.0, -torch.inf], [0.0, 1.0, -torch.inf]], requires_grad=True)
    loss = direct_coverage_optimization(logits, torch.tensor([0, 1]), 4).sum()
    (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(slope[:, :2].square().sum(), logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(slope).all()
    assert torch.isfinite(second[:, :2]).all()


def descend(labels, n):
    logits = torch.zeros(1, len(labels), dtype=torch.float64, requires_grad=True)
    target = torch.tensor([labels], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-14, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = direct_coverage_optimization(logits, target, n).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(1)[0].numpy()


def test_optimum_of_two_draws_is_a_root_in_closed_form():
    labels = np.array([0.7, 0.2, 0.1])

    # q 2 (1 - p) / (p (2 - p)) = m for each class is a quadratic equation in p.
    def p(m):
        return ((m + labels) - np.sqrt(m**2 + labels**2)) / m

    m = brentq(lambda m: p(m).sum() - 1, 1e-3, 1e3)
    np.testing.assert_allclose(descend(labels.tolist(), 2), p(m), atol=1e-6)


@pytest.mark.parametrize(("n", "largest"), [(1, 0.70), (2, 0.60), (4, 0.51), (16, 0.38)])
def test_optimum_spreads_with_the_number_of_draws(n, largest):
    labels = np.array([0.7, 0.2, 0.1])
    found = descend(labels.tolist(), n)
    assert found[0] == pytest.approx(largest, abs=6e-3)
    # Stationary on the simplex: the slope by every probability is the same.
    slopes = labels * n * (1 - found) ** (n - 1) / (1 - (1 - found) ** n)
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-4)


def coverage(callbacks, seed, n):
    """The chance that ``n`` draws hold a held-out label, after fitting noise."""
    module = Noisy(seed)
    loader = DataLoader(TensorDataset(*noisy_data(seed, 300)), batch_size=100)
    trainer(callbacks, max_epochs=40, log_every_n_steps=50).fit(module, loader)
    x, y = noisy_data(100 + seed, 2000)
    with torch.no_grad():
        p = module(x).softmax(1).gather(1, y[:, None])
    return float((1 - (1 - p) ** n).mean())


def test_more_draws_find_the_answer_than_after_the_cross_entropy():
    # Three seeds: 0.74, 0.74, 0.71 with the cross-entropy, and 0.80, 0.79, 0.76 with N = 4.
    for seed in range(3):
        ours = coverage([DirectCoverageOptimization(n=4)], seed, 4)
        assert ours > coverage([], seed, 4) + 0.03


class Tagger(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).transpose(1, 2), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def test_trains_token_logits_by_sequence():
    x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    module, plain = Tagger(), Tagger()
    plain.load_state_dict(module.state_dict())
    technique = DirectCoverageOptimization(n=4, unit="sequence")
    loader = DataLoader(TensorDataset(x, TOKENS), batch_size=2)
    trainer([technique], max_epochs=1).fit(module, loader)
    nll = F.cross_entropy(plain(x).transpose(1, 2), TOKENS, reduction="none").sum(1)
    loss = -(1 - (1 - torch.exp(-nll)) ** 4).log().mean()
    loss.backward()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach() - 0.5 * theirs.grad)


def test_sequences_need_a_label_per_token():
    with pytest.raises(RegularizationError, match=r'per token \(B, T\).*unit="row"'):
        fit([DirectCoverageOptimization(unit="sequence")], max_epochs=1)


@pytest.mark.parametrize("arguments", [{"n": 0.5}, {"n": float("inf")}, {"unit": "token"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="DirectCoverageOptimization"):
        DirectCoverageOptimization(**arguments)
