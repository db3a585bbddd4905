"""SAM's perturbation against its definition, the official code, and what it does to training."""

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_reg.engine import ArgumentError
from lightning_reg.engine.schedule import LinearSchedule
from lightning_reg.techniques.sharpness.sam import SAM, sam_perturbation
from tests.engine.simple import fit, trainer, weights

DOUBLE = {"dtype": torch.float64}
WEIGHTS = [
    torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], **DOUBLE),
    torch.tensor([0.3, -0.7], **DOUBLE),
]
GRADIENTS = [
    torch.tensor([[0.2, 0.1, -0.4], [1.0, -0.5, 0.0]], **DOUBLE),
    torch.tensor([-0.3, 0.6], **DOUBLE),
]


def dot(one, other):
    return sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))


def test_step_has_length_rho_along_the_joint_gradient():
    length = np.sqrt(0.04 + 0.01 + 0.16 + 1.0 + 0.25 + 0.09 + 0.36)
    for e, g in zip(sam_perturbation(GRADIENTS, 0.3), GRADIENTS, strict=True):
        np.testing.assert_allclose(e.numpy(), 0.3 * g.numpy() / length, rtol=1e-11)


def test_no_other_step_of_that_length_raises_a_linear_loss_more():
    rise = dot(sam_perturbation(GRADIENTS, 0.3), GRADIENTS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = [torch.randn(g.shape, generator=generator, **DOUBLE) for g in GRADIENTS]
        assert 0.3 / np.sqrt(dot(other, other)) * dot(other, GRADIENTS) < rise


def test_equals_the_official_step():
    # SamsungLabs/ASAM@f156a68, asam.py, SAM(rho=0.5).ascent_step() on a Linear layer in float64.
    official = [
        [
            [0.07235746052924208, 0.03617873026462104, -0.14471492105848432],
            [0.3617873026462108, -0.18089365132310542, 0.0],
        ],
        [-0.10853619079386323, 0.21707238158772646],
    ]
    for found, expected in zip(sam_perturbation(GRADIENTS, 0.5), official, strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_adaptive_equals_the_official_step():
    # SamsungLabs/ASAM@f156a68, asam.py, ASAM(rho=0.5, eta=0.01).ascent_step() on a Linear layer
    # in float64: the weight is scaled, the bias is not.
    official = [
        [
            [0.06055369984875969, 0.11991128455983446, -0.030879359534677797],
            [2.9680276369355837e-05, -1.3445313596700037, 0.0],
        ],
        [-0.08904082910806749, 0.17808165821613497],
    ]
    found = sam_perturbation(GRADIENTS, 0.5, weights=[WEIGHTS[0], None], eta=0.01)
    for e, expected in zip(found, official, strict=True):
        np.testing.assert_allclose(e.numpy(), expected, rtol=1e-10)


def test_adaptive_rise_is_invariant_to_a_rescaling_that_keeps_the_function():
    """ASAM's claim: w -> A w with gradient A^-1 g gives the displacement A e (eta = 0)."""
    factors = [torch.tensor([4.0, 0.5, 2.0], **DOUBLE), torch.tensor(8.0, **DOUBLE)]
    scaled = [w * a for w, a in zip(WEIGHTS, factors, strict=True)]
    gradients = [g / a for g, a in zip(GRADIENTS, factors, strict=True)]
    here = sam_perturbation(GRADIENTS, 0.5, weights=WEIGHTS, eta=0.0)
    there = sam_perturbation(gradients, 0.5, weights=scaled, eta=0.0)
    for e, moved, a in zip(here, there, factors, strict=True):
        torch.testing.assert_close(moved, a * e, rtol=1e-10, atol=0)


def test_zero_gradient_moves_nothing():
    for adaptive in (None, WEIGHTS):
        moves = sam_perturbation([torch.zeros_like(g) for g in GRADIENTS], 0.5, weights=adaptive)
        assert all(torch.equal(e, torch.zeros_like(e)) for e in moves)


def test_half_precision_norm_does_not_overflow():
    # The norm is 120000, and the largest number of float16 is 65504.
    (found,) = sam_perturbation([torch.full((16,), 30000.0, dtype=torch.float16)], 1.0)
    assert found.dtype == torch.float16
    assert torch.equal(found, torch.full((16,), 0.25, dtype=torch.float16))


def test_no_gradient_passes_through_the_perturbation():
    moves = sam_perturbation([g.clone().requires_grad_() for g in GRADIENTS], 0.3)
    assert not any(e.requires_grad for e in moves)


class Valley(L.LightningModule):
    """A quadratic loss over one named weight and a bias, where every step has a closed form."""

    H = torch.tensor([[3.0, 1.0], [1.0, 2.0]], **DOUBLE)

    def __init__(self, batches=1):
        super().__init__()
        self.batches = batches
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], **DOUBLE))
        self.bias = torch.nn.Parameter(torch.tensor([0.5, 0.25], **DOUBLE))

    def training_step(self, batch, batch_idx):
        both = self.weight + self.bias
        loss = 0.5 * both @ self.H @ both
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(range(self.batches))


def one_step(technique, accumulate=1):
    module = Valley(accumulate)
    run = trainer(
        [technique], max_epochs=1, precision="64-true", accumulate_grad_batches=accumulate
    )
    run.fit(module)
    return module.weight.detach(), module.bias.detach(), run.callback_metrics


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("sharpness", ["micro", "rank"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_follows_the_gradient_at_the_perturbed_weights(adaptive, sharpness, accumulate):
    """Weight and bias have the gradient g = H (w + b), and get one tensor of autograd for both."""
    start, bias, h = np.array([1.0, -2.0]), np.array([0.5, 0.25]), Valley.H.numpy()
    g = h @ (start + bias)
    scale = np.abs(start) + 0.01 if adaptive else np.ones(2)
    factor = 0.3 / np.sqrt((scale * g) @ (scale * g) + g @ g)
    moved = start + bias + factor * scale**2 * g + factor * g
    technique = SAM(0.3, adaptive=adaptive, sharpness=sharpness)
    found, found_bias, metrics = one_step(technique, accumulate)
    np.testing.assert_allclose(found.numpy(), start - 0.1 * h @ moved, rtol=1e-10)
    np.testing.assert_allclose(found_bias.numpy(), bias - 0.1 * h @ moved, rtol=1e-10)
    clean = 0.5 * (start + bias) @ g
    np.testing.assert_allclose(float(metrics["loss"]), clean, rtol=1e-6)
    rise = 0.5 * moved @ h @ moved - clean
    np.testing.assert_allclose(float(metrics["reg/sam"]), rise, rtol=1e-6)


def test_several_ascent_steps_share_rho():
    start, bias, h = np.array([1.0, -2.0]), np.array([0.5, 0.25]), Valley.H.numpy()
    moved = start + bias
    for _ in range(3):
        g = h @ moved
        moved = moved + 2 * 0.1 * g / np.sqrt(2 * g @ g)
    found, _, _ = one_step(SAM(0.3, steps=3))
    np.testing.assert_allclose(found.numpy(), start - 0.1 * h @ moved, rtol=1e-10)


class Product(L.LightningModule):
    """L = (uv - 1)^2 / 2: every point of uv = 1 is a minimum, of sharpness u^2 + v^2."""

    def __init__(self, u, v):
        super().__init__()
        self.u = torch.nn.Parameter(torch.tensor(u))
        self.v = torch.nn.Parameter(torch.tensor(v))

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.u * self.v - 1).square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(range(120))


@pytest.mark.parametrize("start", [(2.5, 0.5), (-0.2, -2.5)])
def test_ends_in_a_flatter_minimum_than_gradient_descent(start):
    """Gradient descent about conserves u^2 - v^2, SAM drives it to 0: sharpness 2 is the least."""
    sharpness = []
    for rho in (0.0, 0.3):
        module = Product(*start)
        trainer([SAM(rho)], max_epochs=1).fit(module)
        u, v = float(module.u.detach()), float(module.v.detach())
        assert u * v == pytest.approx(1.0, abs=0.15)
        sharpness.append(u * u + v * v)
    assert sharpness[0] > 5
    assert sharpness[1] < 2.5


def test_rho_zero_trains_the_same_bits():
    plain, _ = fit([])
    for technique in (SAM(0.0), SAM(LinearSchedule(0.0, 0.0)), SAM(0.0, adaptive=True)):
        module, _ = fit([technique])
        assert torch.equal(weights(module), weights(plain))


def test_norm_weights_are_scaled_by_name_and_biases_are_not():
    technique = SAM(adaptive=True)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    technique.on_reference(None, module)
    named = dict(module.named_parameters())
    assert technique._scaled == {id(named["0.weight"]), id(named["1.weight"])}


@pytest.mark.parametrize(
    "arguments",
    [
        {"rho": -0.1},
        {"rho": float("nan")},
        {"rho": float("inf")},
        {"rho": "large"},
        {"eta": -1.0},
        {"sharpness": "all"},
        {"steps": 0},
        {"steps": 1.5},
    ],
)
def test_bad_arguments_are_refused_with_a_cure(arguments):
    with pytest.raises(ArgumentError, match=r"SAM: .*Try: SAM\("):
        SAM(**arguments)
