"""ELLE: the official numbers, closed forms, and ELLE-A's state."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.techniques.gradients.elle import ELLE, elle
from tests.engine.simple import INPUTS, LABELS, Host, fit, trainer

# The error of LIONS-EPFL/ELLE@0f16c0e, core/utils/train.py, for logits 3 tanh(x W^T) in float64 at
# these draws, and its gradient by W.
W = (torch.arange(12, dtype=torch.float64).view(3, 4) * 0.9).sin()
X = (torch.arange(8, dtype=torch.float64).view(2, 4) * 0.6).cos()
Y = torch.tensor([0, 2])
DRAWS = torch.tensor(
    [
        [0.9700530018065531, 0.707819864399788, 0.45938294312745087, 0.9207476841219603],
        [0.6450241201227648, 0.7911478921803037, 0.17860617520075095, 0.3511076243939284],
        [0.5813409198075745, 0.2882358921361502, 0.4528688488811142, 0.17679952620371409],
        [0.35526675833930643, 0.6219052486795277, 0.48184840078170854, 0.4408004990443595],
    ],
    dtype=torch.float64,
)
ALPHA = torch.tensor([0.40728157436444157, 0.2054385934615871], dtype=torch.float64)
OFFICIAL_VALUE = 0.003983888245652391
OFFICIAL_GRADIENT = [
    [-0.0046383980653372965, 0.0012886882780079915, -0.003456129504352907, 0.02091374191241754],
    [1.9640075722865283e-05, 7.316484817215937e-06, 2.49513529856772e-05, -3.102198153213855e-05],
    [0.0008964105269501752, 3.882175291927605e-05, 0.00024459179298568813, -0.0025881063469598447],
]


def test_value_and_gradient_of_the_official_code():
    w = W.clone().requires_grad_()

    def loss(x):
        return F.cross_entropy(3 * torch.tanh(x @ w.T), Y, reduction="none")

    first, second = (X.repeat(2, 1) + 0.5 * (2 * DRAWS - 1)).chunk(2)
    between = (1 - ALPHA)[:, None] * first + ALPHA[:, None] * second
    value = elle(loss(first), loss(second), loss(between), ALPHA).mean()
    assert value.item() == pytest.approx(OFFICIAL_VALUE, abs=1e-15)
    (gradient,) = torch.autograd.grad(value, w)
    expected = torch.tensor(OFFICIAL_GRADIENT, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


def test_a_linear_loss_has_no_error_and_a_square_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    a, b, alpha = torch.rand(3, 50, dtype=torch.float64, generator=generator)
    c = (1 - alpha) * a + alpha * b
    line = elle(3 * a - 1, 3 * b - 1, 3 * c - 1, alpha)
    torch.testing.assert_close(line, torch.zeros_like(line))
    square = elle(a.square(), b.square(), c.square(), alpha)
    torch.testing.assert_close(square, (alpha * (1 - alpha) * (a - b).square()).square())


class Curved(Host):
    """Logits (0, u) with u = log(e^v - 1), whose cross-entropy for class 0 is v = |x|^2 + 1."""

    def __init__(self):
        super().__init__(lr=0.0)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        wanted = self.scale * (x.square().sum(1) + 1)
        return torch.stack([torch.zeros_like(wanted), wanted.expm1().log()], 1)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        return F.cross_entropy(self(x.double()), torch.zeros(len(x), dtype=torch.long))


def test_the_triplets_are_uniform_in_the_ball():
    # The loss of class 0 is exactly |x|^2 + 1. Then the error is (a (1 - a) |x_a - x_b|^2)^2 with
    # E[(a (1 - a))^2] = 1/30, and |x_a - x_b|^2 a sum of 8 squared differences of uniform
    # numbers: E d^2 = 2 e^2 / 3, E d^4 = 16 e^4 / 15.
    epsilon, width = 0.3, 8
    fourth = width * 16 / 15 + width * (width - 1) * 4 / 9
    expected = epsilon**4 * fourth / 30
    x = INPUTS[:, :width] * 0.3

    values = [error_of(seed, epsilon, x) for seed in range(20)]
    # 20 runs of 64 triplets; the standard error is measured.
    assert abs(np.mean(values) - expected) < 4 * np.std(values) / 20**0.5
    assert np.std(values) / 20**0.5 < 0.1 * expected


def error_of(seed, epsilon, x):
    run = trainer([ELLE(1.0, epsilon=epsilon, name=f"elle_{seed}")], max_epochs=1)
    data = TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    run.fit(Curved(), DataLoader(data, batch_size=len(x)))
    return run.callback_metrics[f"reg/elle_{seed}"].item()


def by_hand(errors, decay, sensitivity):
    """Lambda over the past of errors, from the definition with all of them kept."""
    share, past, shares = 1.0, [], []
    for error in errors:
        limit = np.mean(past) + sensitivity * np.std(past) if len(past) > 2 else np.inf
        share = 1.0 if error > limit else share * decay
        past.append(error)
        shares.append(share)
    return shares


class Watch(ELLE):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, name="elle")
        self.seen = []

    def _adapt(self, step, error):
        share = super()._adapt(step, error)
        self.seen.append((error.item(), share.item()))
        return share


def test_lambda_follows_its_rule_with_all_past_errors():
    technique = Watch(5.0, epsilon=0.5, adaptive=True, decay=0.9, sensitivity=0.5)
    fit([technique], max_epochs=6)
    errors, shares = zip(*technique.seen, strict=True)
    expected = by_hand(errors, 0.9, 0.5)
    assert shares == pytest.approx(expected, rel=1e-9)
    assert 1.0 in expected[4:]
    assert min(expected) < 0.9


def test_it_makes_the_loss_linear_in_the_ball():
    epsilon = 0.3

    def error(module):
        generator = torch.Generator().manual_seed(1)
        x = INPUTS.repeat(20, 1)
        a, b = (x + epsilon * (2 * torch.rand(x.shape, generator=generator) - 1) for _ in range(2))
        alpha = torch.rand(len(x), generator=generator)
        c = (1 - alpha)[:, None] * a + alpha[:, None] * b
        y = LABELS.repeat(20)
        losses = [F.cross_entropy(module.net(p), y, reduction="none") for p in (a, b, c)]
        return elle(*losses, alpha).mean().item()

    plain, _ = fit([ELLE(0.0, epsilon=epsilon)], max_epochs=80)
    ours, _ = fit([ELLE(1000.0, epsilon=epsilon)], max_epochs=80)
    # Measured: 0.02 of it.
    assert error(ours) < 0.3 * error(plain)
