"""AMP's clipped perturbation against its definition and the official optimizer."""

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.sharpness.adversarial_model_perturbation import (
    AdversarialModelPerturbation,
    adversarial_model_perturbation,
)
from tests.engine.simple import fit, trainer, weights

DOUBLE = {"dtype": torch.float64}


def test_each_tensor_has_a_ball_of_its_own():
    far, near = torch.tensor([3.0, 4.0], **DOUBLE), torch.tensor([0.1, 0.0], **DOUBLE)
    clipped, kept = adversarial_model_perturbation([far, near], 0.5)
    np.testing.assert_allclose(clipped.numpy(), [0.3, 0.4], rtol=1e-10)
    np.testing.assert_array_equal(kept.numpy(), near.numpy())


def test_one_ball_bounds_the_joint_length():
    clipped = adversarial_model_perturbation(
        [torch.tensor([3.0], **DOUBLE), torch.tensor([4.0], **DOUBLE)], 0.5, per_tensor=False
    )
    np.testing.assert_allclose(torch.cat(clipped).numpy(), [0.3, 0.4], rtol=1e-10)


class Quadratic(L.LightningModule):
    """L = a'Ha / 2 + b'Hb / 2 + a'b over two parameters."""

    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], **DOUBLE)

    def __init__(self, lr=0.1):
        super().__init__()
        self.lr = lr
        self.a = torch.nn.Parameter(torch.tensor([1.0, -0.5], **DOUBLE))
        self.b = torch.nn.Parameter(torch.tensor([0.2, 0.1], **DOUBLE))

    def training_step(self, batch, batch_idx):
        a, b = self.a, self.b
        return 0.5 * (a @ self.H @ a) + 0.5 * (b @ self.H @ b) + a @ b

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self):
        return DataLoader(range(2))


def trained(technique, steps=2):
    module = Quadratic()
    run = trainer([technique], max_epochs=1, precision="64-true", limit_train_batches=steps)
    run.fit(module)
    return module.a.detach().numpy(), module.b.detach().numpy()


# hiyouga/AMP-Regularizer@87e689f, amp.py: AMP(lr=0.1, epsilon, inner_lr, inner_iter) on the
# quadratic above in float64, after two steps.
OFFICIAL = [
    (
        0.5,
        1,
        1.0,
        [0.42372411470137367, -0.5065999574744503, -0.2509293272615382, 0.1769173798246483],
    ),
    (
        0.5,
        2,
        0.3,
        [0.4196194115782315, -0.5163864896094182, -0.26361886238932, 0.16498290729301254],
    ),
    (
        5.0,
        2,
        0.3,
        [0.38936344375000004, -0.47032458281249995, -0.23550726249999998, 0.23645906406250006],
    ),
]


@pytest.mark.parametrize(("epsilon", "steps", "inner_lr", "expected"), OFFICIAL)
@pytest.mark.parametrize("sharpness", ["micro", "rank"])
def test_trains_as_the_official_optimizer(epsilon, steps, inner_lr, expected, sharpness):
    technique = AdversarialModelPerturbation(
        epsilon, inner_lr=inner_lr, steps=steps, sharpness=sharpness
    )
    # The official code restores by w + d - d, which is off by a few roundings.
    np.testing.assert_allclose(np.concatenate(trained(technique)), expected, rtol=1e-9)


def test_gradient_is_that_of_the_shifted_point_when_not_clipped():
    """H (I + zeta H) theta on the joint quadratic, where nothing is clipped."""
    h = Quadratic.H.numpy()
    joint = np.block([[h, np.eye(2)], [np.eye(2), h]])
    start = np.array([1.0, -0.5, 0.2, 0.1])
    expected = start - 0.1 * joint @ (start + 0.3 * joint @ start)
    found = trained(AdversarialModelPerturbation(100.0, inner_lr=0.3, per_tensor=False), steps=1)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-12)


def test_one_ball_clips_the_joint_gradient():
    h = Quadratic.H.numpy()
    joint = np.block([[h, np.eye(2)], [np.eye(2), h]])
    start = np.array([1.0, -0.5, 0.2, 0.1])
    g = joint @ start
    expected = start - 0.1 * joint @ (start + 0.2 * g / np.linalg.norm(g))
    found = trained(AdversarialModelPerturbation(0.2, per_tensor=False), steps=1)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-10)


class Product(L.LightningModule):
    """L = (uv - 1)^2 / 2: every point of uv = 1 is a minimum, of sharpness u^2 + v^2."""

    def __init__(self, u, v):
        super().__init__()
        self.u = torch.nn.Parameter(torch.tensor(u))
        self.v = torch.nn.Parameter(torch.tensor(v))

    def training_step(self, batch, batch_idx):
        # Minibatch noise, without which gradients and with them the perturbation would vanish.
        noise = 0.5 * (-1.0) ** batch_idx
        return 0.5 * (self.u * self.v - 1 + noise).square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

    def train_dataloader(self):
        return DataLoader(range(150))


@pytest.mark.parametrize("start", [(2.5, 0.5), (-0.2, -2.0)])
def test_ends_in_a_flatter_minimum_than_gradient_descent(start):
    """AMP follows the loss plus a squared gradient, whose mean over batches grows with u, v."""
    sharpness = []
    for epsilon in (0.0, 0.5):
        module = Product(*start)
        technique = AdversarialModelPerturbation(epsilon, inner_lr=0.5)
        trainer([technique], max_epochs=1).fit(module)
        u, v = float(module.u.detach()), float(module.v.detach())
        sharpness.append(u * u + v * v)
    assert sharpness[1] < 0.5 * sharpness[0]


def test_perturbation_vanishes_with_the_gradient():
    """Unlike SAM, whose step keeps its length: at a minimum AMP stands still."""
    module = Quadratic()
    with torch.no_grad():
        module.a.zero_()
        module.b.zero_()
    run = trainer([AdversarialModelPerturbation(0.5)], max_epochs=1, precision="64-true")
    run.fit(module)
    assert torch.equal(weights(module), torch.zeros(4, **DOUBLE))
    assert float(run.callback_metrics["reg/adversarial_model_perturbation"]) == 0.0


@pytest.mark.parametrize("sharpness", ["rank", "global"])
def test_window_of_micro_batches_equals_one_batch(sharpness):
    """Its length too, which SAM's does not depend on."""
    arguments = {"epsilon": 5.0, "inner_lr": 0.5, "steps": 2, "sharpness": sharpness}
    whole, _ = fit([AdversarialModelPerturbation(**arguments)], batch_size=16)
    parts, _ = fit(
        [AdversarialModelPerturbation(**arguments)], batch_size=4, accumulate_grad_batches=4
    )
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"epsilon": 0.0}, {"inner_lr": 0.0}])
def test_off_trains_the_same_bits(arguments):
    plain, _ = fit([])
    module, _ = fit([AdversarialModelPerturbation(**arguments)])
    assert torch.equal(weights(module), weights(plain))


@pytest.mark.parametrize(
    "arguments",
    [
        {"epsilon": -0.1},
        {"epsilon": float("inf")},
        {"inner_lr": -1.0},
        {"inner_lr": float("nan")},
        {"steps": 0},
        {"sharpness": "all"},
    ],
)
def test_bad_arguments_are_refused_with_a_cure(arguments):
    with pytest.raises(ArgumentError, match=r"AdversarialModelPerturbation: .*Try: Adv"):
        AdversarialModelPerturbation(**arguments)
