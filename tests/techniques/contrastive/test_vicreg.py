"""The value of the official code, and what each term does."""

import numpy as np
import pytest
import torch

from lightning_reg.techniques.contrastive.vicreg import vicreg


def table(k):
    return torch.sin(torch.arange(12, dtype=torch.float64).view(4, 3) * k + k)


def test_value_and_gradient_are_those_of_the_official_code():
    # facebookresearch/vicreg@4e12602, main_vicreg.py:VICReg.forward in one process.
    z1 = table(1.0).requires_grad_()
    value = vicreg(z1, table(1.1))
    (gradient,) = torch.autograd.grad(value, z1)
    assert value.item() == pytest.approx(14.823886034659486, abs=1e-12)
    expected = [-1.1590796947018653, 0.776354731164028, 0.8568272860633687]
    assert gradient[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_terms_are_those_of_numpy():
    a, b = table(1.0).numpy(), table(1.1).numpy()
    apart = ((a - b) ** 2).mean()
    spread = sum(np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4)).mean() for z in (a, b)) / 2
    cov = [np.cov(z.T) for z in (a, b)]
    shared = sum(((c - np.diag(np.diag(c))) ** 2).sum() / 3 for c in cov)
    z = table(1.0), table(1.1)
    assert vicreg(*z, 1, 0, 0).item() == pytest.approx(apart)
    assert vicreg(*z, 0, 1, 0).item() == pytest.approx(spread)
    assert vicreg(*z, 0, 0, 1).item() == pytest.approx(shared)


def test_equal_views_with_wide_uncorrelated_dimensions_cost_nothing():
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    z = 2 * signs + 7
    assert vicreg(z, z).item() == pytest.approx(0, abs=1e-12)


def test_collapsed_embeddings_pay_the_full_hinge_and_have_a_finite_gradient():
    z = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    value = vicreg(z, z, 25, 25, 1)
    (gradient,) = torch.autograd.grad(value, z)
    assert value.item() == pytest.approx(25 * (1 - 1e-2))
    assert gradient.isfinite().all()


def test_variance_term_drives_a_nearly_collapsed_network_to_gamma():
    z = (0.05 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))).double()
    z.requires_grad_()
    optimizer = torch.optim.SGD([z], 0.1)
    for _ in range(800):
        optimizer.zero_grad()
        vicreg(z, z).backward()
        optimizer.step()
    covariance = np.cov(z.detach().numpy().T)
    np.testing.assert_allclose(covariance, np.eye(4), atol=0.03)
