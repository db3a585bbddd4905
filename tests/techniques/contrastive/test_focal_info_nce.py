"""InfoNCE by hand, and weights that leave easy queries alone."""

import numpy as np
import pytest
import torch

from lightning_reg.techniques.contrastive.focal_info_nce import focal_info_nce


def table(k, rows=4):
    return torch.sin(torch.arange(3 * rows, dtype=torch.float64).view(rows, 3) * k + k)


def probabilities(q, p, t, n=None):
    """Of each query's positive, in NumPy."""
    q, p = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (q.numpy(), p.numpy()))
    keys = p if n is None else np.concatenate([p, n.numpy().reshape(-1, 3)])
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    scores = np.exp(q @ keys.T / t)
    return np.diag(scores) / scores.sum(1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_is_the_negative_log_probability_times_its_weight(gamma):
    q, p, n = table(1.0), table(1.1), table(0.7, 8).view(4, 2, 3)
    for hard in (None, n):
        prob = probabilities(q, p, 0.3, hard)
        found = focal_info_nce(q, p, hard, temperature=0.3, gamma=gamma)
        np.testing.assert_allclose(found.numpy(), (1 - prob) ** gamma * -np.log(prob))


def test_gradient_is_that_of_infonce_times_a_constant_weight():
    q, p = table(1.0).requires_grad_(), table(1.1)
    weights = (1 - probabilities(q.detach(), p, 0.05)) ** 0.5
    plain = torch.autograd.grad(focal_info_nce(q, p, gamma=0.0).sum(), q)[0]
    focal = torch.autograd.grad(focal_info_nce(q, p, gamma=0.5).sum(), q)[0]
    torch.testing.assert_close(focal, torch.from_numpy(weights)[:, None] * plain)


def test_share_of_easy_queries_in_the_gradient_falls():
    # One query on its positive, one nearer to the other's.
    q = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=torch.float64)
    norms = [
        torch.autograd.grad(focal_info_nce(q, p, temperature=0.2, gamma=g).sum(), q)[0].norm(dim=1)
        for g in (0.0, 1.0)
    ]
    assert norms[1][0] / norms[1][1] < 0.05 * norms[0][0] / norms[0][1]


def test_query_that_is_sure_of_its_positive_has_no_loss_and_a_finite_gradient():
    z = 5 * torch.eye(3, dtype=torch.float64).requires_grad_()
    value = focal_info_nce(z, z.detach(), temperature=1e-3)
    assert torch.autograd.grad(value.sum(), z)[0].eq(0).all()


def test_a_single_pair_has_no_negatives_and_no_loss():
    assert focal_info_nce(table(1.0, 1), table(1.1, 1)).item() == 0
