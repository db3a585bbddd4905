"""AnyLoss: official values, the metrics that it goes to, and a rare class."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from lightning_reg.functional import any_loss
from tests.techniques.reweighting.rare import rare_f1

NAMES = ["f_beta", "balanced_accuracy", "g_mean", "mcc", "accuracy"]


def fixed(size):
    """Numbers that need no generator."""
    return (torch.arange(size, dtype=torch.float64) * 1.7).sin() * 3


def loss(p, y, *args):
    return any_loss(p.unsqueeze(1), y.unsqueeze(1), *args).sum()


@pytest.mark.parametrize(
    ("metric", "value", "gradient"),
    [
        ("f_beta", 0.3021763348724684, [0.3124654259, -0.0249909805, 0.1491204200]),
        ("balanced_accuracy", 0.2173824942214586, [0.3124998047, -0.0267877950, 0.1491368268]),
    ],
)
def test_official_value_and_gradient(metric, value, gradient):
    # doheonhan/anyloss_extension@0074373, AnyLoss_Code.ipynb, L = 10, b = 1, in float64 with torch
    # in the place of TensorFlow.
    p = fixed(6).sigmoid().requires_grad_()
    found = loss(p, torch.tensor([0, 1, 0, 0, 1, 0]).double(), metric, 1.0, 10.0)
    assert found.item() == pytest.approx(value, rel=1e-9)
    assert torch.autograd.grad(found, p)[0][:3].tolist() == pytest.approx(gradient, abs=1e-9)


def test_the_official_g_mean_is_the_square_of_this_one():
    p = fixed(6).sigmoid()
    found = loss(p, torch.tensor([0, 1, 0, 0, 1, 0]).double(), "g_mean", 1.0, 10.0)
    assert 1 - (1 - found.item()) ** 2 == pytest.approx(0.4241458606245232, rel=1e-9)


def test_a_steep_slope_gives_the_metric_of_decisions():
    p, y = (fixed(60) + 0.1).sigmoid(), (fixed(60).roll(1) > 1.0).double()
    chosen = (p > 0.5).double()
    recall = metrics.recall_score(y, chosen)
    specificity = metrics.recall_score(1 - y, 1 - chosen)
    expected = {
        "f_beta": metrics.fbeta_score(y, chosen, beta=2),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, chosen),
        "g_mean": math.sqrt(recall * specificity),
        "mcc": metrics.matthews_corrcoef(y, chosen),
        "accuracy": metrics.accuracy_score(y, chosen),
    }
    found = {name: 1 - loss(p, y, name, 2.0, 1e5).item() for name in NAMES}
    # 1e-5 in denominators of some tens of samples.
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", NAMES)
def test_no_positives_and_sure_predictions_leave_a_finite_gradient(metric):
    for y in (torch.zeros(4), torch.ones(4)):
        z = torch.tensor([-50.0, -1.0, -50.0, -2.0]).requires_grad_()
        found = loss(z.sigmoid(), y, metric)
        found.backward()
        assert found.isfinite()
        assert z.grad.isfinite().all()


def test_sure_errors_get_no_gradient():
    p = torch.tensor([0.95, 0.5]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(p, torch.tensor([0.0, 1.0]).double(), "accuracy"), p)
    assert abs(gradient[0]) < 1e-9
    assert gradient[1].item() == pytest.approx(-73 / 4 / 2)


def test_the_f1_loss_finds_a_rare_class_that_the_cross_entropy_mostly_misses():
    # F1 of three seeds: 0.32, 0.33, 0.32; cross-entropy: 0.28, 0.26, 0.27.
    def f1_loss(z, y):
        return loss(z.sigmoid(), y, "f_beta", 1.0, 5.0)

    for seed in range(3):
        plain = rare_f1(F.binary_cross_entropy_with_logits, seed)
        assert rare_f1(f1_loss, seed) > plain + 0.02
