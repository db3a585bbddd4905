"""StableMax: formula, the released code's numbers, and no collapse where softmax has one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.outputs.stable_max import StableMax, stable_max
from tests.engine.simple import INPUTS, LABELS, Host, fit, weights

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, -3.0, 4.0]], dtype=torch.float64)
LABEL = torch.tensor([0, 1])


def test_equals_the_released_code_in_value_and_gradient():
    # LucasPrietoAl/grokking-at-the-edge-of-numerical-stability@0cc9e8d, utils.py; the second row
    # has a logit of exactly 0, where the two branches of s meet.
    z = LOGITS.clone().requires_grad_()
    loss = stable_max(z, LABEL).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.8648507243170958, rel=1e-12)
    released = [[-0.06666666666666668, 0.025, 0.1], [0.08, -0.12, 0.08]]
    torch.testing.assert_close(z.grad, torch.tensor(released, dtype=torch.float64))


def test_value_is_minus_the_logarithm_of_the_share():
    z = LOGITS.numpy()
    s = np.where(z >= 0, z + 1, 1 / (1 - np.minimum(z, 0)))
    p = s / s.sum(1, keepdims=True)
    np.testing.assert_allclose(stable_max(LOGITS, LABEL).numpy(), -np.log(p[[0, 1], [0, 1]]))


def test_soft_targets_weight_the_classes():
    soft = torch.tensor([[0.7, 0.1, 0.2], [0.0, 0.5, 0.5]], dtype=torch.float64)
    parts = [stable_max(LOGITS, torch.tensor([c, c])) for c in range(3)]
    expected = sum(soft[:, c] * part for c, part in enumerate(parts))
    torch.testing.assert_close(stable_max(LOGITS, soft), expected)


def test_probabilities_grow_with_their_logit():
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    losses = stable_max(
        torch.stack([z, torch.zeros_like(z)], 1), torch.zeros(101, dtype=torch.long)
    )
    assert (losses.diff() < 0).all()


def test_gradient_survives_where_the_softmax_collapses():
    # Softmax Collapse: in float32 the label's probability rounds to 1 and the gradient to 0.
    z = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    y = torch.tensor([0])
    (collapsed,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    assert (collapsed[0, 0] == 0).all()
    (alive,) = torch.autograd.grad(stable_max(z, y).mean(), z)
    # dL/dz = p (1 / s - 1 / sum s) ... for the label: (p - 1) / (1 + z).
    assert float(alive[0, 0]) == pytest.approx((41 / 43 - 1) / 41, rel=1e-5)


def test_callback_trains_on_the_new_loss():
    module, _ = fit([StableMax()], max_epochs=1)
    plain = Host()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for x, y in zip(INPUTS.split(16), LABELS.split(16), strict=True):
        optimizer.zero_grad()
        z = plain(x).double()
        s = torch.where(z < 0, 1 / (1 - z), z + 1)
        (-(s / s.sum(1, keepdim=True)).log()[range(16), y]).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"strength": 2.0}, {"replaces": "nothing"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="StableMax"):
        StableMax(**arguments)
