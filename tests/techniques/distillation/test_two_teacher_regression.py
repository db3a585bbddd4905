"""Two teachers of a regression: official values, where each of them acts, and smoothed targets."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import TwoTeacherRegression
from lightning_reg.engine import RegularizationError, Signals
from lightning_reg.functional import (
    assistive_loss,
    shape_model,
    soft_landmarks,
    teacher_bounded_loss,
)
from tests.engine.simple import INPUTS, Host, trainer, weights

PLACES = torch.arange(12, dtype=torch.float64).view(3, 4)
TARGETS = torch.sin(PLACES)
OUTPUTS = TARGETS + 0.8 * torch.sin(1.7 * PLACES + 0.3)
TOUGH = TARGETS + 0.3 * torch.cos(2.1 * PLACES)
TOLERANT = TARGETS + 0.5 * torch.cos(0.9 * PLACES + 1)

# aliprf/KD-Loss@5f6f045, custom_Losses.py: kd_loss with the constants of student_train.py and
# main.py, its TensorFlow calls answered by torch: total, main, tough, tolerant; and the gradient.
OFFICIAL = [2.945389742311882, 1.9777075663730146, 0.5795241961491618, 0.3881579797897059]
OFFICIAL_GRADIENT = [
    [0.570833332836628, 0.5508126411930506, -0.6916666651765505, -0.5144038573877989],
    [0.5027250714064357, 0.4643112454773386, -0.5429188633653141, -0.403861135969356],
    [0.5675353277448625, 0.570833332836628, -0.5749398423256717, 0.22746725094306686],
]


def test_official_values_and_gradient():
    outputs = OUTPUTS.clone().requires_grad_()
    main = 2 * teacher_bounded_loss(outputs, TARGETS, TOLERANT).mean()
    tough = assistive_loss(outputs, TARGETS, TOUGH, 1.9, 0.45).mean()
    tolerant = assistive_loss(outputs, TARGETS, TOLERANT, 1.8, 0.4).mean()
    total = main + tough + tolerant
    (gradient,) = torch.autograd.grad(total, outputs)
    for found, expected in zip((total, main, tough, tolerant), OFFICIAL, strict=True):
        # Its constants went through float32.
        assert found.item() == pytest.approx(expected, rel=1e-7)
    expected = torch.tensor(OFFICIAL_GRADIENT, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("side", [1.0, -1.0])
@pytest.mark.parametrize("teacher", [0.4, -0.4])
def test_a_teacher_acts_on_the_side_of_the_student_and_towards_the_target(side, teacher):
    """Errors of 1, 0.2 and 0.03 against one of 0.4: worse, better, and near enough."""
    outputs = (side * torch.tensor([1.0, 0.2, 0.03])).double().requires_grad_()
    zeros, taught = torch.zeros(3).double(), torch.full((3,), teacher).double()
    values = assistive_loss(outputs, zeros, taught, 1.9, 0.45, 0.15)
    expected = torch.tensor([1.9 * 0.6, -0.45 * 0.2, 0.0]).double()
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-7)
    (gradient,) = torch.autograd.grad(values.sum(), outputs)
    expected = side * torch.tensor([1.9, 0.45, 0.0]).double()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-7)


def test_a_perfect_teacher_has_nothing_to_add():
    values = assistive_loss(OUTPUTS, TARGETS, TARGETS)
    torch.testing.assert_close(values, torch.zeros_like(values))


def test_main_loss_is_continuous_at_the_teachers_error():
    outputs = torch.tensor([0.5 - 1e-9, 0.5 + 1e-9]).double()
    inside, outside = teacher_bounded_loss(outputs, torch.zeros(2), torch.full((2,), 0.5))
    assert float(inside) == pytest.approx(float(outside), abs=1e-7)


def test_shape_model_is_a_principal_component_analysis():
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randn(30, 3, generator=generator).double() @ torch.diag(
        torch.tensor([5.0, 2.0, 1.0]).double()
    )
    shapes = shapes @ torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q[:3]
    shapes = shapes + 0.01 * torch.randn(30, 6, generator=generator).double() + 1.0
    mean, modes, deviations = shape_model(shapes, 0.95)
    expected = PCA(n_components=0.95).fit(shapes.numpy())
    assert len(modes) == expected.n_components_
    np.testing.assert_allclose(deviations.square().numpy(), expected.explained_variance_)
    soft = soft_landmarks(shapes, mean, modes, deviations, limit=100.0)
    again = expected.inverse_transform(expected.transform(shapes.numpy()))
    np.testing.assert_allclose(soft.numpy(), again, atol=1e-10)


def test_smoothed_targets_stay_within_three_deviations_of_each_mode():
    mean, modes = torch.zeros(3), torch.eye(3)[:2]
    soft = soft_landmarks(torch.tensor([[9.0, 1.0, 5.0]]), mean, modes, torch.tensor([2.0, 0.5]))
    assert soft.tolist() == [[6.0, 1.0, 0.0]]


class Regressor(Host):
    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self(x)
        return {"loss": nn.functional.mse_loss(outputs, y), "logits": outputs}


def _teachers(**others):
    torch.manual_seed(4)
    return {"tough_teacher": nn.Linear(8, 4), "tolerant_teacher": nn.Linear(8, 4), **others}


def _fit(technique, targets):
    module = Regressor()
    data = DataLoader(TensorDataset(INPUTS, targets), batch_size=16)
    trainer([technique], max_steps=1).fit(module, data)
    return module


def test_first_step_has_the_gradient_of_the_formula():
    teachers, y = _teachers(), INPUTS[:, :4].sin()
    settings = {"main_weight": 0.5, "tough_weight": 2.0, "tolerant_weight": 3.0, "near": 0.3}
    pulls = {"tough_pull": 1.0, "tough_push": 0.2, "tolerant_pull": 0.7, "tolerant_push": 0.1}
    module = _fit(TwoTeacherRegression(0.6, **teachers, **settings, **pulls), y)
    host, x, y = Regressor(), INPUTS[:16], y[:16]
    outputs = host(x)
    tough, tolerant = (t(x).detach() for t in teachers.values())
    loss = 0.4 * nn.functional.mse_loss(outputs, y) + 0.6 * (
        0.5 * teacher_bounded_loss(outputs, y, tolerant).mean()
        + 2.0 * assistive_loss(outputs, y, tough, 1.0, 0.2, 0.3).mean()
        + 3.0 * assistive_loss(outputs, y, tolerant, 0.7, 0.1, 0.3).mean()
    )
    loss.backward()
    host.configure_optimizers().step()
    torch.testing.assert_close(weights(module), weights(host), rtol=1e-5, atol=1e-6)


def test_targets_and_teachers_of_another_shape_are_named():
    with pytest.raises(RegularizationError, match=r"needs a target for each output \(16, 4\)"):
        _fit(
            TwoTeacherRegression(signals=Signals(targets=_one_number), **_teachers()), INPUTS[:, :4]
        )
    other = _teachers(tolerant_teacher=nn.Linear(8, 3))
    with pytest.raises(RegularizationError, match=r"tolerant_teacher answers \(16, 3\)"):
        _fit(TwoTeacherRegression(**other), INPUTS[:, :4])


def _one_number(step):
    return step.batch[1][:, 0]


class Small(Host):
    """Six numbers to ten, through a hidden layer."""

    def __init__(self, hidden, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 10))

    def training_step(self, batch, batch_idx):
        outputs = self(batch[0])
        return {"loss": nn.functional.mse_loss(outputs, batch[1]), "logits": outputs}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def _trained(module, x, y, steps, callbacks=()):
    run = trainer(callbacks, max_steps=steps, max_epochs=-1)
    run.fit(module, DataLoader(TensorDataset(x, y), batch_size=64))
    return module


def test_teachers_lower_the_error_of_a_small_network_under_the_main_loss():
    """64 noisy samples, teachers of 640, 2 seeds: test error of 0.056 to 0.097, measured."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(6, 16, generator=generator) / 2
    outer = torch.randn(16, 10, generator=generator) / 4
    x = torch.randn(1000, 6, generator=generator)
    clean = torch.tanh(x @ inner) @ outer
    y = clean + 0.3 * torch.randn(1000, 10, generator=generator)
    tough = _trained(Small(64, 0), x[:640], y[:640], 100)
    smooth = soft_landmarks(y[:640], *shape_model(y[:640]))
    tolerant = _trained(Small(64, 1), x[:640], smooth, 100)
    errors = {}
    for weight in (0.0, 1.0):
        found = []
        for seed in (2, 3):
            technique = TwoTeacherRegression(
                tough_teacher=tough,
                tolerant_teacher=tolerant,
                tough_weight=weight,
                tolerant_weight=weight,
            )
            student = _trained(Small(8, seed), x[:64], y[:64], 60, [technique])
            with torch.no_grad():
                found.append(float((student(x[640:]) - clean[640:]).square().mean()))
        errors[weight] = sum(found) / 2
    assert errors[1.0] < 0.85 * errors[0.0]
