"""Losses that wrong labels bend less: official values, limits, and tolerance to noise."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg import GeneralizedCrossEntropy
from lightning_reg.functional import generalized_cross_entropy, symmetric_cross_entropy
from tests.engine.simple import fit

SCORES = torch.tensor(
    [[1.0, -0.5, 0.25, 2.0], [0.0, 1.5, -1.0, 0.5], [-0.75, 0.25, 3.0, 1.0]], dtype=torch.float64
)
TRUE = torch.tensor([0, 3, 1])
LABELS = F.one_hot(TRUE, 4).double()


def _value_and_gradient(loss):
    scores = SCORES.clone().requires_grad_()
    value = loss(scores, LABELS).mean()
    return value.item(), torch.autograd.grad(value, scores)[0][0].tolist()


def test_official_value_and_gradient_of_the_symmetric_loss():
    # HanxunH/SCELoss-Reproduce@c81fb33, loss.py, alpha 0.1, beta 1, in float32.
    value, gradient = _value_and_gradient(symmetric_cross_entropy)
    assert value == pytest.approx(7.8775529861450195, rel=1e-6)
    official = [-0.5637643933296204, 0.03684856742620468, 0.07800842076539993, 0.4489074647426605]
    assert gradient == pytest.approx(official, rel=1e-5)


def test_official_value_and_gradient_of_the_generalized_loss():
    # AlanChou/Truncated-Loss@fef5908, TruncatedLoss.py, q 0.7, with the constant that its k = 0.5
    # takes off added again, in float32.
    value, gradient = _value_and_gradient(generalized_cross_entropy)
    assert value == pytest.approx(1.034867763519287, rel=1e-6)
    official = [-0.09118768572807312, 0.005960176698863506, 0.012617693282663822, 0.072609812021255]
    assert gradient == pytest.approx(official, rel=1e-5)


def test_official_value_and_gradient_of_the_truncated_loss():
    # Optimization-AI/ICML2023_LDR@732fc85, loss.py, GCELoss(q=0.7, k=0.5), in float32.
    scores = torch.tensor(
        [[1.0, -2.0, 0.5, 3.0], [0.2, 0.1, -0.3, 0.4], [-1.0, 2.5, 0.0, 1.5]], requires_grad=True
    )
    labels = F.one_hot(torch.tensor([3, 0, 2]), 4).float()
    value = generalized_cross_entropy(scores, labels, 0.7, 0.5).mean()
    (gradient,) = torch.autograd.grad(value, scores)
    assert value.item() == pytest.approx(0.42898455, abs=1e-6)
    official = [0.03198643, 0.00159251, 0.01940075, -0.05297969]
    assert gradient[0].tolist() == pytest.approx(official, abs=1e-6)
    assert gradient[1:].eq(0).all()


def test_generalized_loss_goes_from_the_cross_entropy_to_the_absolute_error():
    torch.testing.assert_close(
        generalized_cross_entropy(SCORES, LABELS, 1e-6),
        F.cross_entropy(SCORES, TRUE, reduction="none"),
        rtol=1e-5,
        atol=1e-5,
    )
    p = SCORES.softmax(1).gather(1, TRUE[:, None]).squeeze(1)
    torch.testing.assert_close(generalized_cross_entropy(SCORES, LABELS, 1.0), 1 - p)


def test_truncated_samples_have_a_constant_loss():
    scores = SCORES.clone().requires_grad_()
    p = SCORES.softmax(1).gather(1, TRUE[:, None]).squeeze(1)
    k = float(p.sort().values[1]) + 1e-6
    loss = generalized_cross_entropy(scores, LABELS, 0.7, k)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    given_up = p <= k
    assert given_up.sum() == 2
    assert (gradient[given_up] == 0).all()
    assert (gradient[~given_up] != 0).all()
    torch.testing.assert_close(loss[given_up], torch.full((2,), (1 - k**0.7) / 0.7).double())


def test_reverse_cross_entropy_is_symmetric():
    """Summed over all labels it is a constant: uniform noise only scales and shifts it."""
    total = sum(
        symmetric_cross_entropy(SCORES, F.one_hot(torch.full((3,), c), 4).double(), 0.0, 1.0, -4.0)
        for c in range(4)
    )
    torch.testing.assert_close(total, torch.full((3,), 4.0 * 3).double())


def test_generalized_losses_of_all_labels_stay_within_their_bounds():
    """(C - C^(1-q)) / q at the uniform prediction is the least, (C - 1) / q at a sure one the most.

    The narrower they are, the closer the loss is to a symmetric one.
    """
    q, classes = 0.7, 4
    generator = torch.Generator().manual_seed(0)
    scores = 5 * torch.randn(200, classes, generator=generator, dtype=torch.float64)
    scores[0], scores[1] = 0.0, torch.tensor([500.0, 0.0, 0.0, 0.0])
    labels = [F.one_hot(torch.full((200,), c), classes).double() for c in range(classes)]
    total = sum(generalized_cross_entropy(scores, label, q) for label in labels)
    ends = sorted([(classes - classes ** (1 - q)) / q, (classes - 1) / q])
    assert total.min().item() == pytest.approx(ends[0], abs=1e-6)
    assert total.max().item() == pytest.approx(ends[1], abs=1e-6)


def test_a_ruled_out_label_has_a_finite_gradient():
    scores = torch.tensor([[0.0, -torch.inf, 3.0]], requires_grad=True)
    loss = generalized_cross_entropy(scores, torch.tensor([[0.0, 1.0, 0.0]]), 0.5)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient[0, [0, 2]]).all()


def test_truncation_begins_with_its_epoch():
    seen = []

    class Watched(GeneralizedCrossEntropy):
        def losses(self, step, logits, distribution):
            found = super().losses(step, logits, distribution)
            plain = generalized_cross_entropy(logits, distribution, self.q)
            seen.append((step.epoch, bool(torch.equal(found, plain))))
            return found

    fit([Watched(k=0.9, truncate_from=1)], max_epochs=2)
    assert all(same == (epoch == 0) for epoch, same in seen)
    assert {epoch for epoch, _ in seen} == {0, 1}
