"""OrthoGrad: the projection, the released code's numbers, and grokking without weight decay."""

import pytest
import torch
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.gradients.ortho_grad import OrthoGrad, ortho_grad
from tests.engine.simple import Host, fit


def pair(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, dtype=torch.float64, generator=generator)


def test_equals_the_released_code():
    # LucasPrietoAl/grokking-at-the-edge-of-numerical-stability@0cc9e8d, orthograd.py.
    w = torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.float64)
    g = torch.tensor([[1.0, 0.5], [0.75, 2.0]], dtype=torch.float64)
    released = [0.8700722614258858, 0.9394258474815723, -0.003152435729803923, 2.0427783529129493]
    (ours,) = ortho_grad([w], [g])
    torch.testing.assert_close(ours.flatten(), torch.tensor(released, dtype=torch.float64))


def test_gradient_is_orthogonal_to_the_weight_and_keeps_its_norm():
    w, g = pair(3, 4)
    (ours,) = ortho_grad([w], [g])
    assert (w * ours).sum().abs() < 1e-14
    assert ours.norm() == pytest.approx(float(g.norm()), rel=1e-12)


def test_equation_of_the_paper_only_shortens():
    w, g = pair(3, 4)
    (ours,) = ortho_grad([w], [g], rescale=False)
    # Pythagoras: what is gone is the length along the weight.
    along = (w * g).sum() / w.norm()
    assert ours.square().sum() == pytest.approx(float(g.square().sum() - along.square()))
    torch.testing.assert_close(g - ours, along * w / w.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_along_the_weight_is_not_replaced_by_rounding(dtype):
    w = torch.tensor([0.1, 0.7, -0.3], dtype=dtype)
    (ours,) = ortho_grad([w], [w * (1 / 3)])
    assert ours.norm() < 1e-6 * w.norm()


def test_weight_of_zeros_and_single_elements_keep_their_gradient():
    gradients = [torch.ones(3), torch.tensor([2.0]), torch.tensor(3.0)]
    ours = ortho_grad([torch.zeros(3), torch.tensor([5.0]), torch.tensor(4.0)], gradients)
    for new, old in zip(ours, gradients, strict=True):
        assert torch.equal(new, old)


def test_every_parameter_is_projected_as_in_the_released_code():
    module = Host(batch_norm=True)
    grads = {}

    class Looks(OrthoGrad):
        def edit_gradients(self, update):
            value = super().edit_gradients(update)
            grads.update(
                {n: (p.detach().clone(), p.grad.clone()) for n, p in module.named_parameters()}
            )
            return value

    fit([Looks()], module=module, max_epochs=1)
    assert len(grads) == 6
    for name, (w, g) in grads.items():
        assert (w * g).sum().abs() <= 1e-5 * w.norm() * g.norm(), name


def test_radial_part_of_a_homogeneous_network_scales_the_logits():
    # In a ReLU network without biases the removed direction changes no prediction.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    net.double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 3, (20,))
    weights = list(net.parameters())
    gradients = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), weights)
    projected = ortho_grad([w.detach() for w in weights], gradients, rescale=False)
    before = net(x)
    with torch.no_grad():
        for w, g, p in zip(weights, gradients, projected, strict=True):
            w -= 0.5 * (g - p)
    ratio = net(x) / before
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    assert abs(float(ratio[0, 0]) - 1) > 1e-4


def test_norms_of_weights_grow_less_than_without():
    # Along the sphere a step of length d adds d^2 to the squared norm, and nothing of first order.
    class Plain(Host):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    start = Plain().net[4].weight.detach().norm()
    plain, _ = fit(module=Plain(), max_epochs=40)
    ours, _ = fit([OrthoGrad()], module=Plain(), max_epochs=40)
    growth = [float(abs(m.net[4].weight.detach().norm() - start)) for m in (plain, ours)]
    assert growth[1] < 0.2 * growth[0]


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_bad_strength_is_refused(strength):
    with pytest.raises(ArgumentError, match="OrthoGrad"):
        OrthoGrad(strength)
