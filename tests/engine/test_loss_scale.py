"""A factor of the loss: your loss is scaled, penalties and the logged loss are not."""

import pytest
import torch

from lightning_reg.engine import Regularizer
from tests.engine.simple import Host, fit


class Factor(Regularizer):
    """Multiplies the loss, and adds a penalty of its own."""

    def __init__(self, factor, strength=1.0):
        super().__init__(strength)
        self.factor = factor

    def scale_loss(self, step):
        return self.factor

    def penalty(self, step):
        return step.module.net[0].bias.sum()


def moved(factor):
    """How far one step moves the weights, and the loss that the host logged."""
    module, run = fit([Factor(factor)], max_steps=1)
    pairs = zip(module.net.named_parameters(), Host().net.parameters(), strict=True)
    return {name: (now - then).detach() for (name, now), then in pairs}, run.callback_metrics[
        "loss"
    ]


def test_scales_the_loss_and_not_penalties():
    (one, loss), (half, loss_of_half) = moved(1.0), moved(0.5)
    # The learning rate is 0.1, and the penalty pulls each of these numbers by 1.
    assert torch.allclose(half["0.bias"] + 0.1, 0.5 * (one["0.bias"] + 0.1), atol=1e-6)
    assert torch.allclose(half["4.weight"], 0.5 * one["4.weight"], atol=1e-6)
    assert loss_of_half.item() == pytest.approx(loss.item())
