"""Gradient edits: of the right gradients, once per optimizer step, at their true scale."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.mechanisms.gradient_transform import GradientTransform, radial_parts
from lightning_reg.mechanisms.selected_weights import EVERYTHING
from tests.engine.simple import INPUTS, LABELS, Host, fit, weights


class Cubed(GradientTransform):
    """An edit that is not linear, so that scale and order show."""

    default_selection = EVERYTHING

    def transform(self, weights, gradients):
        return [30 * g**3 for g in gradients], torch.stack([g.norm() for g in gradients]).norm()


def reference(share: float = 1.0) -> torch.Tensor:
    module = Host()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        for x, y in zip(INPUTS.split(16), LABELS.split(16), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            for p in module.parameters():
                p.grad = (1 - share) * p.grad + share * 30 * p.grad**3
            optimizer.step()
    return weights(module)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_equals_a_plain_loop_once_per_optimizer_step(accumulate):
    module, _ = fit([Cubed()], batch_size=16 // accumulate, accumulate_grad_batches=accumulate)
    torch.testing.assert_close(weights(module), reference(), rtol=0, atol=1e-6)


def test_strength_is_the_share_of_the_change():
    module, _ = fit([Cubed(0.25)])
    torch.testing.assert_close(weights(module), reference(0.25), rtol=0, atol=1e-6)


def test_technique_sees_unscaled_gradients_under_fp16():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module, _ = fit([Cubed()], plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert (weights(module) - reference()).abs().max() < 2e-3


def test_value_is_logged():
    module = Host(lr=0.0)
    _, run = fit([Cubed()], module=module, batch_size=64, max_epochs=1)
    loss = nn.functional.cross_entropy(module(INPUTS), LABELS)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    expected = torch.stack([g.norm() for g in gradients]).norm()
    assert run.callback_metrics["reg/cubed"] == pytest.approx(float(expected), rel=1e-5)


def test_only_chosen_gradients_change():
    module, _ = fit([Cubed(parameters="net.4")], max_epochs=1, batch_size=64)
    plain, _ = fit(max_epochs=1, batch_size=64)
    assert torch.equal(module.net[0].weight, plain.net[0].weight)
    assert not torch.equal(module.net[4].weight, plain.net[4].weight)


def test_sparse_gradient_is_refused():
    class Sparse(Host):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 4, sparse=True)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.table(batch[1]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(RegularizationError, match="sparse"):
        fit([Cubed()], module=Sparse())


def test_radial_part_is_along_the_weight_and_the_rest_across():
    w, g = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (part,) = radial_parts([w], [g])
    factor = part / w
    torch.testing.assert_close(factor, factor.flatten()[0].expand(3, 4))
    assert ((g - part) * w).sum().abs() < 1e-14
    assert (radial_parts([torch.zeros(3)], [torch.ones(3)])[0] == 0).all()


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_share_outside_the_unit_interval_is_refused(strength):
    with pytest.raises(ArgumentError, match="Cubed"):
        Cubed(strength)
