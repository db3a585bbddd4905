"""MDCA, DCA, the correctness-aware penalty: released values, what is 0, and overconfidence."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.mechanisms.labeled_output_penalty import confidence_and_correctness
from lightning_reg.techniques.outputs.correctness_aware_penalty import (
    CorrectnessAwarePenalty,
    correctness_aware_penalty,
)
from lightning_reg.techniques.outputs.dca import DCA, dca
from lightning_reg.techniques.outputs.mdca import MDCA, mdca
from tests.engine.simple import fit
from tests.techniques.outputs.noisy import overconfidence, plain_overconfidence

LOGITS = torch.tensor(
    [[2.0, -1.0, 0.5], [0.0, -3.0, 1.0], [-1.0, 0.3, 0.2], [4.0, 1.0, -2.0]], dtype=torch.float64
)
ONE_HOT = F.one_hot(torch.tensor([0, 1, 2, 1]), 3).double()
# mdca-loss/MDCA-Calibration@cece2e5, solvers/loss.py, and GB-TonyLiang/DCA@045ee26, loss_fn.py with
# alpha 0 and beta 1.
MDCA_VALUE, MDCA_FIRST = 0.24018175812899079, [0.005121120262767974, -0.0062637966471387595]
DCA_VALUE = 0.4791490435600281
DCA_GRADIENT = [
    [0.04210858345845299, -0.00768168039415196, -0.03442690306430103],
    [-0.04786265883311336, -0.002382941467591961, 0.050245600300705316],
    [-0.014371199794129758, 0.062085263430647956, -0.0477140636365182],
    [0.01180067510814836, -0.011241017787059679, -0.0005596573210887148],
]


def test_mdca_is_that_of_the_released_code():
    z = LOGITS.clone().requires_grad_()
    value = mdca(z.softmax(1).mean(0), ONE_HOT.mean(0))
    value.backward()
    assert float(value.detach()) == pytest.approx(MDCA_VALUE, rel=1e-12)
    assert z.grad[0, :2].tolist() == pytest.approx(MDCA_FIRST, rel=1e-10)


def test_dca_is_that_of_the_released_code():
    z = LOGITS.clone().requires_grad_()
    value = dca(*(v.mean() for v in confidence_and_correctness(z, ONE_HOT)))
    value.backward()
    # That code averages in float32.
    assert float(value.detach()) == pytest.approx(DCA_VALUE, rel=1e-7)
    torch.testing.assert_close(z.grad, torch.tensor(DCA_GRADIENT, dtype=torch.float64))


def test_means_that_agree_cost_nothing_whatever_the_rows():
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.2, 0.8], [0.8, 0.2]])
    assert float(mdca(p.mean(0), torch.tensor([0.5, 0.5]))) == pytest.approx(0, abs=1e-7)
    assert float(dca(p.amax(1).mean(), torch.tensor(0.85))) == pytest.approx(0, abs=1e-7)


def test_narrow_errors_lower_their_confidence_where_the_cross_entropy_raises_it():
    # The label has 0.4 and the predicted class 0.45: the paper's example of a narrow error.
    p = torch.tensor([[0.40, 0.45, 0.15]], dtype=torch.float64)
    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)
    logits = p.log() / temperature
    confidence, right = confidence_and_correctness(logits, torch.tensor([[1.0, 0, 0]]).double())
    (penalty,) = torch.autograd.grad(
        correctness_aware_penalty(confidence, right).sum(), temperature, retain_graph=True
    )
    (entropy,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0])), temperature)
    assert penalty < 0  # a higher temperature lowers it
    assert entropy > 0


def test_without_balance_the_minimum_is_the_probability_of_being_right():
    right = (torch.arange(100) < 73).double()
    confidences = torch.linspace(0, 1, 1001, dtype=torch.float64)
    values = torch.stack([correctness_aware_penalty(r, right).mean() for r in confidences])
    assert float(confidences[values.argmin()]) == pytest.approx(0.73)


def test_balance_gives_right_and_wrong_rows_the_same_weight():
    class Given(CorrectnessAwarePenalty):
        def value(self, step, logits, distribution):
            # One right row in five, all with confidence 0.8.
            p = torch.tensor([[0.8, 0.2]] * 5)
            labels = F.one_hot(torch.tensor([0, 1, 1, 1, 1]), 2).float()
            self.result = super().value(step, p.log(), labels)
            return logits.sum() * 0

    ours = Given()
    fit([ours], max_epochs=1)
    mean = float(ours.result.total / ours.result.count)
    assert mean == pytest.approx((0.2**2 + 0.8**2) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "drop"),
    [
        (lambda: MDCA(10.0), 0.1),
        (lambda: DCA(10.0), 0.08),
        (lambda: CorrectnessAwarePenalty(4.0), 0.05),
        (lambda: CorrectnessAwarePenalty(10.0, balanced=False), 0.01),
    ],
)
def test_overconfidence_falls(make, drop):
    # Held-out confidence minus accuracy, two seeds: 0.22 and 0.23 without; with them 0.02 to 0.07,
    # 0.10, 0.12 to 0.14 and 0.20.
    for seed in range(2):
        assert overconfidence([make()], seed) < plain_overconfidence(seed) - drop
