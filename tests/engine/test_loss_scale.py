"""A factor of the loss: your loss is scaled, penalties and the logged loss are not."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg import LabelSmoothing
from lightning_reg.engine import Regularizer
from tests.engine.simple import INPUTS, LABELS, Host, fit, weights


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


class Instead(Regularizer):
    """``(1 - s) L + s mean z^2``."""

    needs = ("logits",)

    def penalty(self, step):
        return step.logits.square().mean()

    def scale_loss(self, step):
        return 1 - step.strength(self)


def _by_hand(loss):
    module = Host()
    loss(module(INPUTS[:16]), LABELS[:16]).backward()
    module.configure_optimizers().step()
    return weights(module)


def test_shares_of_the_loss_that_others_have_changed():
    module, _ = fit([Instead(0.3), LabelSmoothing(0.1)], max_steps=1)
    expected = _by_hand(
        lambda z, y: 0.7 * F.cross_entropy(z, y, label_smoothing=0.1) + 0.3 * z.square().mean()
    )
    torch.testing.assert_close(weights(module), expected, rtol=1e-5, atol=1e-6)


def test_two_of_them_share_what_the_other_leaves():
    module, _ = fit([Instead(0.3), Instead(0.5, name="other")], max_steps=1)
    expected = _by_hand(lambda z, y: 0.35 * F.cross_entropy(z, y) + 0.8 * z.square().mean())
    torch.testing.assert_close(weights(module), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_that_the_user_logs_stays_what_it_was():
    _, run = fit([Instead(1.0)], max_steps=1)
    plain = F.cross_entropy(Host()(INPUTS[:16]), LABELS[:16])
    torch.testing.assert_close(run.callback_metrics["loss"], plain.detach())
