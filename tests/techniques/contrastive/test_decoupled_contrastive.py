"""The value of a released code, and the coupling that is gone."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.techniques.contrastive.decoupled_contrastive import decoupled_contrastive


def table(k):
    return torch.sin(torch.arange(12, dtype=torch.float64).view(4, 3) * k + k)


@pytest.mark.parametrize(
    ("sigma", "expected", "row"),
    [
        (None, 2.457621758054914, [-0.24433678619, 0.13566518666, 0.58278278251]),
        (0.5, 3.196819359799415, [-0.08476080695, 0.06028954202, 0.11694042893]),
    ],
)
def test_value_and_gradient_are_those_of_a_released_code(sigma, expected, row):
    # raminnakhli/Decoupled-Contrastive-Learning@0b9b76d, loss/dcl.py, the mean of both directions
    # of DCL() and DCLW() on normalized vectors.
    z1 = table(1.0).requires_grad_()
    value = decoupled_contrastive(z1, table(1.1), 0.1, sigma)
    (gradient,) = torch.autograd.grad(value, z1)
    assert value.item() == pytest.approx(expected, abs=1e-9)
    assert gradient[0].tolist() == pytest.approx(row, abs=1e-9)


def test_gradient_of_infonce_is_q_times_this_one():
    # For one anchor: q = 1 - p_positive. Two samples leave one anchor's terms easy to write down.
    t = 0.2
    scores = torch.tensor([0.9, 0.3, -0.2], dtype=torch.float64, requires_grad=True) / t
    scores.retain_grad()
    infonce = torch.autograd.grad(-scores.log_softmax(0)[0], scores, retain_graph=True)[0]
    decoupled = torch.autograd.grad(scores[1:].logsumexp(0) - scores[0], scores)[0]
    q = 1 - scores.softmax(0)[0].detach()
    torch.testing.assert_close(infonce, q * decoupled)


def test_every_anchor_leaves_out_both_views_of_its_own_sample():
    z1, z2, t = table(1.0), table(1.1), 0.1
    a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    total = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        for anchor in (a[i], b[i]):
            negatives = sum(torch.exp(anchor @ v[j] / t) for v in (a, b) for j in others)
            total += -(a[i] @ b[i]) / t + negatives.log()
    assert decoupled_contrastive(z1, z2, t).item() == pytest.approx(total.item() / 8)


def test_length_of_the_embeddings_does_not_matter():
    z1, z2 = table(1.0), table(1.1)
    torch.testing.assert_close(
        decoupled_contrastive(3 * z1, 0.1 * z2), decoupled_contrastive(z1, z2)
    )


def test_an_easy_positive_still_pulls():
    # The positive is far closer than any negative: InfoNCE's gradient is below 1e-6 of this one.
    t = 0.05
    z1 = torch.tensor([[1.0, 0.1], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    z2 = torch.tensor([[1.0, 0.0], [-1.0, 0.1]], dtype=torch.float64)
    ours = torch.autograd.grad(decoupled_contrastive(z1, z2, t), z1)[0].norm()
    a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    logits = torch.cat([a @ b.T, a @ a.T - 1e9 * torch.eye(2)], 1) / t
    infonce = F.cross_entropy(logits, torch.arange(2))
    assert torch.autograd.grad(infonce, z1)[0].norm() < 1e-6 * ours
    assert ours > 0.1


def test_small_sigma_ignores_all_but_the_easiest_positive():
    # The weights are 2 - N softmax(s / sigma): 2 - N for the easiest, 2 for the others.
    z1, z2, t = table(1.0), table(1.1), 0.1
    positive = F.cosine_similarity(z1, z2)
    weight = torch.full((4,), 2.0, dtype=torch.float64)
    weight[positive.argmax()] = 2 - 4
    difference = decoupled_contrastive(z1, z2, t, 1e-4) - decoupled_contrastive(z1, z2, t)
    expected = -((weight - 1) * positive).mean() / t
    torch.testing.assert_close(difference, expected)
