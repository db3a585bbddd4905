"""Weight compander: the curve, the bound, and what is learned."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.reparameterization.weight_compander import (
    WeightCompander,
    weight_compander,
)
from tests.engine.simple import Host, fit, weights

V = torch.linspace(-9, 9, 37, dtype=torch.float64)


def test_curve_is_the_scaled_arctangent():
    expected = 0.7 * np.arctan(V.numpy() / 1.3)
    np.testing.assert_allclose(weight_compander(V, 0.7, 1.3).numpy(), expected, rtol=1e-12)


def test_curve_is_odd_increasing_and_bounded_with_slope_alpha_over_beta():
    w = weight_compander(V, 0.7, 1.3)
    torch.testing.assert_close(w, -w.flip(0))
    assert (w.diff() > 0).all()
    assert (weight_compander(1e9 * V, 0.7, 1.3).abs() <= 0.7 * math.pi / 2).all()
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(weight_compander(zero, 0.7, 1.3), zero)
    assert float(slope) == pytest.approx(0.7 / 1.3)


class Watch(Callback):
    def __init__(self):
        self.parts, self.largest = {}, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.parts = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        self.largest.append(float(pl_module.net[4].weight.detach().abs().max()))


def test_weights_stay_within_the_bound_that_plain_training_exceeds():
    watch, plain = Watch(), Watch()
    fit([WeightCompander(0.25, learn=False), watch], max_epochs=30)
    fit([plain], max_epochs=30)
    assert max(watch.largest) < 0.25 * math.pi / 2 < max(plain.largest)


def test_alpha_and_beta_are_learned_unless_told_otherwise():
    learned, fixed = Watch(), Watch()
    fit([WeightCompander(), learned])
    fit([WeightCompander(learn=False), fixed])
    name = "net.4.parametrizations.weight.0.log_ratio"
    assert (learned.parts[name] != 0).all()
    assert (fixed.parts[name] == 0).all()


def test_default_bound_is_twice_the_largest_weight_with_slope_one():
    module = Host()
    weight = module.net[0].weight.detach()
    function = WeightCompander().parametrization("net.0.weight", weight)
    v = torch.tensor([0.0, 1e9], requires_grad=True)
    w = function(v)
    assert float(w[1].detach()) == pytest.approx(2 * float(weight.abs().max()), rel=1e-5)
    (slope,) = torch.autograd.grad(w[0], v)
    assert float(slope[0]) == pytest.approx(1.0)


def test_inverse_gives_the_weight_back():
    weight = Host().net[0].weight.detach()
    function = WeightCompander(0.5, 0.1).parametrization("net.0.weight", weight)
    torch.testing.assert_close(function(function.right_inverse(weight)), weight)


def test_layer_of_zeros_trains():
    module = Host()
    torch.nn.init.zeros_(module.net[4].weight)
    fit([WeightCompander()], module=module)
    assert (module.net[4].weight != 0).any()
    assert torch.isfinite(weights(module)).all()


@pytest.mark.parametrize("arguments", [{"alpha": 0.0}, {"beta": -1.0}, {"alpha": math.inf}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="WeightCompander"):
        WeightCompander(**arguments)


def test_bound_below_a_weight_is_refused_with_one_that_works():
    with pytest.raises(ArgumentError, match=r"alpha=0\.4"):
        fit([WeightCompander(alpha=1e-3, parameters="net.0")])
