"""A penalty that stands in for a share of the loss."""

import torch
import torch.nn.functional as F

from lightning_reg import LabelSmoothing
from lightning_reg.engine import Regularizer
from tests.engine.simple import INPUTS, LABELS, Host, fit, weights


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
