"""The two losses of that name: one that no shift or scale changes, one that forbids the shift."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.outputs.palm_z_loss import PaLMZLoss, palm_z_loss
from lightning_reg.techniques.outputs.spherical_z_loss import SphericalZLoss, spherical_z_loss
from tests.techniques.outputs.digits import accuracy, predictions

LOGITS = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def gradient(loss, logits=LOGITS):
    z = logits.clone().requires_grad_()
    loss(z).sum().backward()
    return z.grad


# ---------------------------------------------------------------------- the spherical one


def test_is_the_softplus_of_the_z_score():
    z = LOGITS.numpy()
    score = ((z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True))[range(7), LABELS]
    expected = np.log1p(np.exp(0.5 * (1.2 - score))) / 0.5
    np.testing.assert_allclose(spherical_z_loss(LOGITS, LABELS, 0.5, 1.2).numpy(), expected)


def test_shift_and_scale_change_nothing():
    moved = 17.0 * LOGITS - 3.0
    torch.testing.assert_close(spherical_z_loss(moved, LABELS), spherical_z_loss(LOGITS, LABELS))


def test_gradient_is_orthogonal_to_the_logits_and_to_their_shift():
    found = gradient(lambda z: spherical_z_loss(z, LABELS))
    zeros = torch.zeros(7, dtype=torch.float64)
    torch.testing.assert_close((found * LOGITS).sum(1), zeros, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.sum(1), zeros, rtol=0, atol=1e-12)


def test_is_spherical():
    # Rotations that keep the label's logit and the sum of the others change nothing.
    others = torch.tensor([1, 2, 3, 4])
    basis = torch.linalg.qr(torch.cat([torch.ones(4, 1), torch.eye(4)[:, :3]], 1).double())[0]
    turn = nn.init.orthogonal_(torch.empty(3, 3, dtype=torch.float64))
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), turn)
    rotation = basis @ inner @ basis.T
    rotated = LOGITS.clone()
    rotated[:, others] = LOGITS[:, others] @ rotation
    assert (rotated - LOGITS).abs().max() > 0.1
    zeros = torch.zeros(7, dtype=torch.long)
    torch.testing.assert_close(spherical_z_loss(rotated, zeros), spherical_z_loss(LOGITS, zeros))


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_one_logit_above_equal_others_is_the_minimum_log_2(classes):
    logits = F.one_hot(torch.tensor([0]), classes).double()
    value = spherical_z_loss(logits, torch.tensor([0]))
    torch.testing.assert_close(value, torch.full((1,), math.log(2), dtype=torch.float64))
    found = gradient(lambda z: spherical_z_loss(z, torch.tensor([0])), logits)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_equal_logits_have_a_loss_and_no_gradient():
    logits = torch.full((2, 5), 3.0)
    value = spherical_z_loss(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(value, torch.full((2,), math.log1p(math.exp(2.0))))
    assert (gradient(lambda z: spherical_z_loss(z, torch.tensor([0, 1])), logits) == 0).all()


def test_soft_labels_weight_the_terms_of_their_classes():
    soft = torch.tensor([[0.7, 0.3, 0.0, 0.0, 0.0]] * 7, dtype=torch.float64)
    parts = [spherical_z_loss(LOGITS, torch.full((7,), c)) for c in (0, 1)]
    torch.testing.assert_close(spherical_z_loss(LOGITS, soft), 0.7 * parts[0] + 0.3 * parts[1])


def test_descent_turns_the_logits_and_does_not_stretch_them():
    def norms(loss):
        z = LOGITS.clone().requires_grad_()
        for _ in range(1000):
            (slope,) = torch.autograd.grad(loss(z).sum(), z)
            z = (z - 0.01 * slope).detach().requires_grad_()
        centred = z - z.mean(1, keepdim=True)
        assert (z.argmax(1) == LABELS).all()
        return centred.norm(dim=1)

    start = (LOGITS - LOGITS.mean(1, keepdim=True)).norm(dim=1)
    stretched = norms(lambda z: F.cross_entropy(z, LABELS, reduction="sum"))
    turned = norms(lambda z: spherical_z_loss(z, LABELS))
    torch.testing.assert_close(turned, start, rtol=0.05, atol=0)
    assert (stretched > 1.3 * start).all()


def test_learns_digits_as_the_cross_entropy_does():
    # Four seeds: 0.950, 0.954, 0.952, 0.964, and 0.936, 0.954, 0.945, 0.959 with the cross-entropy.
    for seed in range(2):
        ours = accuracy(*predictions([SphericalZLoss()], seed))
        assert ours > accuracy(*predictions([], seed)) - 0.03


# ---------------------------------------------------------------------- PaLM's


def test_value_and_gradient_are_those_of_the_formula():
    z = LOGITS.numpy()
    log_z = np.log(np.exp(z).sum(1))
    np.testing.assert_allclose(palm_z_loss(LOGITS).numpy(), log_z**2)
    expected = 2 * log_z[:, None] * np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(gradient(palm_z_loss).numpy(), expected)


def test_the_optimum_is_the_cross_entropys_with_a_normalizer_of_one():
    # At labels q the logits log q are best for both terms: the penalty picks one of all shifts.
    labels = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    z = torch.full((1, 3), 4.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(z, labels) + 0.01 * palm_z_loss(z).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(z.detach(), labels.log(), rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow():
    z = torch.tensor([[1e4, 0.0], [-1e4, -1e4]])
    expected = torch.tensor([1e8, (1e4 - math.log(2)) ** 2])
    torch.testing.assert_close(palm_z_loss(z), expected)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (SphericalZLoss, {"a": 0.0}),
        (SphericalZLoss, {"b": math.inf}),
        (PaLMZLoss, {"strength": -1}),
    ],
)
def test_bad_arguments_are_refused(kind, arguments):
    with pytest.raises(ArgumentError, match=kind.__name__):
        kind(**arguments)
