"""Norm loss: value, pull, and where training under it ends."""

import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.weights.norm_loss import NormLoss, norm_loss
from tests.engine.simple import Host, fit

KERNEL = torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def closed_form(matrix):
    return NormLoss().closed_form([matrix])


def test_value_is_the_squared_distance_of_filter_norms_to_one():
    norms = np.sqrt((KERNEL.numpy().reshape(5, -1) ** 2).sum(1))
    np.testing.assert_allclose(norm_loss(KERNEL).item(), ((1 - norms) ** 2).sum(), rtol=1e-12)


def test_gradient_at_twice_the_unit_vector_is_two():
    value, (gradient,) = closed_form(torch.tensor([[2.0, 0.0]]))
    assert value.tolist() == [1.0]
    assert gradient.tolist() == [[2.0, 0.0]]


def test_pull_vanishes_on_the_unit_sphere():
    unit = KERNEL.flatten(1) / KERNEL.flatten(1).norm(dim=1, keepdim=True)
    value, (gradient,) = closed_form(unit)
    assert value.abs().max() < 1e-30
    assert gradient.abs().max() < 1e-14


def test_row_of_zeros_takes_no_gradient():
    value, (gradient,) = closed_form(torch.zeros(2, 3))
    assert value.tolist() == [2.0]
    assert (gradient == 0).all()


def test_closed_form_is_the_gradient_of_the_value():
    matrix = KERNEL.flatten(1).clone().requires_grad_()
    (expected,) = torch.autograd.grad(norm_loss(matrix), matrix)
    torch.testing.assert_close(closed_form(matrix.detach())[1][0], expected)
    assert torch.autograd.gradcheck(norm_loss, (matrix,))


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_training_ends_with_unit_norms_from_either_side(scale):
    class Still(Host):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Still()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    start = [p.detach().clone() for p in module.parameters()]
    fit([NormLoss(1.0)], module=module, max_epochs=20)
    for weight, before in zip(module.parameters(), start, strict=True):
        if weight.ndim == 1:
            assert torch.equal(weight, before)
            continue
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)), atol=1e-5, rtol=0)
        # Only norms move: directions are kept.
        cosine = (weight * before).sum(1) / weight.norm(dim=1) / before.norm(dim=1)
        torch.testing.assert_close(cosine, torch.ones(len(weight)))


def test_negative_strength_is_refused():
    with pytest.raises(ArgumentError, match="NormLoss"):
        NormLoss(-0.1)
