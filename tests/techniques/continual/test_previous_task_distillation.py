"""The divergence from the task before, its official values, and what is forgotten with it."""

import functools

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.continual.previous_task_distillation import (
    PreviousTaskDistillation,
    feature_distillation,
    prediction_distillation,
)
from lightning_reg.testing import ContractCase, check_regularizer
from tests.contract.cases.distillation_anchor import CASES
from tests.engine.simple import INPUTS, Host, fit, trainer, weights


def rows(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# The inputs of the official values: 3 samples, 3 classes before and a new one.
LOGITS = (torch.arange(12.0, dtype=torch.float64).view(3, 4) * 0.7).sin() * 2
BEFORE = (torch.arange(9.0, dtype=torch.float64).view(3, 3) * 1.3).cos() * 2


# ---------------------------------------------------------------------- official values


def test_softmax_form_is_the_official_cross_entropy_less_the_entropy_of_the_reference():
    # shaunak27/data-free-continual-learning@b25364c, learners/default.py:loss_fn_kd, T = 2.
    z = LOGITS.clone().requires_grad_()
    value = prediction_distillation(z[:, :3], BEFORE, 2.0).mean()
    p = (BEFORE / 2).softmax(1).numpy()
    entropy = -(p * np.log(p)).sum(1).mean()
    assert value.item() + entropy == pytest.approx(1.4405170668575291, abs=1e-12)
    (gradient,) = torch.autograd.grad(value, z)
    expected = [
        [-0.0719710012, 0.0079030360, 0.0640679652, 0.0],
        [0.0754173135, -0.0096488918, -0.0657684217, 0.0],
        [-0.0618636374, 0.0166529346, 0.0452107027, 0.0],
    ]
    np.testing.assert_allclose(gradient, expected, atol=1e-10)


def test_sigmoid_form_is_the_official_share_of_the_old_classes():
    # Ibid., learners/kd.py:LWF_MC.update_model with labels of the new class 3. Its mean over
    # all classes is 3/4 of the old ones' and 1/4 of the new one's cross-entropy.
    z = LOGITS.clone().requires_grad_()
    old = prediction_distillation(z[:, :3], BEFORE, 1.0, "sigmoid").mean()
    new = F.softplus(-z[:, 3]).mean()
    s = BEFORE.sigmoid().numpy()
    entropy = -(s * np.log(s) + (1 - s) * np.log(1 - s)).mean()
    total = 0.75 * (old + entropy) + 0.25 * new
    assert total.item() == pytest.approx(1.0002255248658223, abs=1e-12)
    (gradient,) = torch.autograd.grad(total, z)
    expected = [
        [-0.0317330898, 0.0127695219, 0.0604194411, -0.0125871864],
        [0.0393152571, -0.0322529168, -0.0605732822, -0.0730885692],
        [-0.0255344542, 0.0314817562, 0.0452109108, -0.0101424929],
    ]
    np.testing.assert_allclose(gradient, expected, atol=1e-10)


def test_features_are_the_official_mean_square():
    # Ibid., learners/kd.py:LWF_MC_FEATKD.update_model, mu = 1.
    h = (torch.arange(15.0, dtype=torch.float64).view(3, 5) * 0.4).sin().requires_grad_()
    reference = (torch.arange(15.0, dtype=torch.float64).view(3, 5) * 0.9).cos()
    value = feature_distillation(h, reference).mean()
    assert value.item() == pytest.approx(1.1179917068687155, abs=1e-12)
    (gradient,) = torch.autograd.grad(value, h)
    expected = [-0.1333333333, -0.0309588835, 0.1259410914, 0.2448148304, 0.2528442693]
    np.testing.assert_allclose(gradient[0], expected, atol=1e-10)


# ---------------------------------------------------------------------- closed forms


def test_two_classes_by_hand():
    # p' = (2/3, 1/3) and p = (1/2, 1/2) at T = 2.
    z, then = torch.zeros(1, 2), torch.tensor([[2 * np.log(2.0), 0.0]])
    expected = 2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3)
    assert prediction_distillation(z, then, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_gradients_are_the_differences_of_probabilities():
    z, then = rows(5, 4, seed=0).requires_grad_(), rows(5, 4, seed=1)
    (soft,) = torch.autograd.grad(prediction_distillation(z, then, 3.0).sum(), z)
    expected = ((z / 3).softmax(1) - (then / 3).softmax(1)) / 3
    torch.testing.assert_close(soft, expected)
    (coins,) = torch.autograd.grad(prediction_distillation(z, then, 3.0, "sigmoid").sum(), z)
    torch.testing.assert_close(coins, ((z / 3).sigmoid() - (then / 3).sigmoid()) / (3 * 4))


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_it_is_zero_with_no_gradient_at_the_reference_and_positive_elsewhere(form):
    z = rows(6, 5, seed=0).requires_grad_()
    value = prediction_distillation(z, z.detach().clone(), 2.0, form)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.abs().max() < 1e-15
    assert gradient.abs().max() < 1e-15
    assert prediction_distillation(z, rows(6, 5, seed=1), 2.0, form).min() > 0


def test_softmax_form_ignores_a_shift_of_all_logits_and_the_sigmoid_form_does_not():
    z, then = rows(4, 3, seed=0), rows(4, 3, seed=1)
    for form, same in (("softmax", True), ("sigmoid", False)):
        one, other = (prediction_distillation(x, then, 2.0, form) for x in (z, z + 5.0))
        assert torch.allclose(one, other) == same


def test_a_high_temperature_makes_it_the_variance_of_the_differences():
    # KL -> 1 / (2 T^2) Var_c(z_c - z'_c) with equal weights of the classes.
    z, then, t = rows(4, 5, seed=0), rows(4, 5, seed=1), 1e4
    limit = (z - then).var(1, correction=0) / (2 * t**2)
    torch.testing.assert_close(prediction_distillation(z, then, t), limit, rtol=1e-3, atol=0)


def test_classes_that_the_reference_rules_out_do_not_count():
    z = torch.tensor([[1.0, 2.0, float("-inf")]], requires_grad=True)
    then = torch.tensor([[0.5, 0.0, float("-inf")]])
    value = prediction_distillation(z, then)
    torch.testing.assert_close(value, prediction_distillation(z[:, :2], then[:, :2]))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert gradient.isfinite().all()


def test_no_gradient_reaches_the_reference():
    z, then = rows(3, 4, seed=0).requires_grad_(), rows(3, 4, seed=1).requires_grad_()
    values = [prediction_distillation(z, then, 2.0, f).sum() for f in ("softmax", "sigmoid")]
    values.append(feature_distillation(z, then).sum())
    torch.stack(values).sum().backward()
    assert then.grad is None
    assert z.grad is not None


def test_features_of_any_shape_count_each_number_once():
    h, reference = rows(2, 3, 4, 4, seed=0), rows(2, 3, 4, 4, seed=1)
    expected = ((h - reference) ** 2).numpy().reshape(2, -1).mean(1)
    np.testing.assert_allclose(feature_distillation(h, reference), expected)


# ---------------------------------------------------------------------- the class


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, lambda z, r: prediction_distillation(z, r, 2.0)),
        ({"temperature": 4.0}, lambda z, r: prediction_distillation(z, r, 4.0)),
        ({"form": "sigmoid"}, lambda z, r: prediction_distillation(z, r, 1.0, "sigmoid")),
        ({"target": "features", "layer": "net.4"}, feature_distillation),
    ],
)
def test_settings_reach_the_function(settings, value):
    now, then = rows(5, 4, seed=0), rows(5, 4, seed=1)
    assert torch.equal(PreviousTaskDistillation(**settings).distance(now, then), value(now, then))


def test_its_value_is_logged_without_the_strength_in_the_second_task():
    technique = PreviousTaskDistillation(3.0, target="features", layer="net.2")
    start, module = Host(), Host()
    with torch.no_grad():
        start.net[0].bias.add_(0.5)
    technique.take_reference(start)
    difference = start.net[:3](INPUTS[:16]) - module.net[:3](INPUTS[:16])
    expected = difference.square().mean().item()
    _, run = fit([technique], module, max_epochs=1, limit_train_batches=1)
    logged = run.callback_metrics["reg/previous_task_distillation"].item()
    assert logged == pytest.approx(expected, rel=1e-5)


def test_both_targets_act_side_by_side_under_names_of_their_own():
    start = Host()
    with torch.no_grad():
        start.net[0].bias.add_(0.5)

    def train(*chosen):
        made = {
            "predictions": PreviousTaskDistillation(5.0),
            "features": PreviousTaskDistillation(
                5.0, target="features", layer="net.2", name="features"
            ),
        }
        used = [made[name] for name in chosen]
        for technique in used:
            technique.take_reference(start)
        return fit(used, Host(), max_epochs=1)

    both, run = train("predictions", "features")
    one, other = train("predictions")[0], train("features")[0]
    assert {"reg/previous_task_distillation", "reg/features"} <= run.callback_metrics.keys()
    assert not torch.equal(weights(both), weights(one))
    assert not torch.equal(weights(both), weights(other))


@pytest.mark.parametrize(
    "arguments",
    [
        {"strength": -1.0},
        {"target": "weights"},
        {"target": "features"},
        {"target": "features", "layer": ""},
        {"layer": "encoder"},
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"form": "linear"},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match=r"PreviousTaskDistillation.*Try: "):
        PreviousTaskDistillation(**arguments)


FEATURES = {"strength": 5.0, "target": "features", "layer": "encoder"}


@pytest.mark.parametrize("args", [FEATURES, {"strength": 5.0, "form": "sigmoid"}])
def test_the_other_targets_keep_the_contract(args, ranks):
    case = ContractCase(
        args=args,
        neutral={"strength": 0.0},
        companions=CASES["PreviousTaskDistillation"].companions,
    )
    checks = ["neutral", "acts", "semantics", "replicas", "accumulation", "resume", "copies"]
    check_regularizer(PreviousTaskDistillation, case, checks=checks, ranks=ranks)


# ---------------------------------------------------------------------- forgetting


def digits(*classes):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    kept = np.isin(y, classes)
    return torch.tensor(x[kept] / 16, dtype=torch.float32), torch.tensor(y[kept])


class Digits(L.LightningModule):
    """Six logits from the start; a task's loss is on the logits of its own three classes."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 6)
        self.first = 0

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        own = slice(self.first, self.first + 3)
        return F.cross_entropy(self(batch[0])[:, own], batch[1] - self.first)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def two_tasks(technique, seed):
    """Accuracy on digits 0 to 2 lost by learning 3 to 5, and that on 3 to 5."""
    module, (x, y) = Digits(seed), digits(0, 1, 2)
    right = []
    for first in (0, 3):
        module.first = first
        data = DataLoader(TensorDataset(*digits(first, first + 1, first + 2)), batch_size=60)
        trainer([technique] if technique else [], max_epochs=10).fit(module, data)
        right.append((module(x)[:, :3].argmax(1) == y).float().mean().item())
    new_x, new_y = digits(3, 4, 5)
    new = (module(new_x)[:, 3:].argmax(1) + 3 == new_y).float().mean().item()
    return right[0] - right[1], new


SEEDS = (0, 1, 2, 3)


@functools.cache
def fine_tuning():
    return np.mean([two_tasks(None, seed) for seed in SEEDS], 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 1.0, "classes": 3},
        {"strength": 3.0, "classes": 3, "form": "sigmoid"},
        {"strength": 1.0, "target": "features", "layer": "encoder"},
    ],
)
def test_less_than_a_third_is_forgotten_and_the_new_task_is_still_learnt(settings):
    # Means over four seeds; fine-tuning loses 13 points of accuracy on the first task.
    lost, new = np.mean([two_tasks(PreviousTaskDistillation(**settings), s) for s in SEEDS], 0)
    plain_lost, plain_new = fine_tuning()
    assert plain_lost > 0.1
    assert lost < plain_lost / 3, (lost, plain_lost)
    assert new > plain_new - 0.03, (new, plain_new)
