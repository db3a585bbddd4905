"""What becomes of the user's loss, and which rows the new one is computed on."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine import ArgumentError, RegularizationError
from lightning_reg.engine.schedule import LinearSchedule
from lightning_reg.mechanisms.loss_replacement import LossReplacement
from tests.engine.simple import CLASSES, INPUTS, LABELS, Host, fit, weights


class SquaredError(LossReplacement):
    """The squared distance of softmax and label."""

    def losses(self, step, logits, distribution):
        return (logits.softmax(-1) - distribution).square().sum(-1)


class TwoTerms(Host):
    """Its loss has a term beside the cross-entropy."""

    def training_step(self, batch, batch_idx):
        hidden = self.net[0](batch[0])
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.1 * hidden.square().mean()


def squared_error(logits, labels):
    return (logits.softmax(-1) - F.one_hot(labels, CLASSES)).square().sum(-1).mean()


def after_one_step(loss, module=None):
    """The weights after one step of plain SGD on ``loss(module)``."""
    module = module or Host()
    loss(module).backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    return weights(module)


def one_step(technique, module=None):
    module, run = fit([technique], module=module, batch_size=64, max_epochs=1)
    return weights(module), run


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_strength_is_the_share_of_the_new_loss(strength):
    trained, run = one_step(SquaredError(strength))

    def loss(module):
        logits = module(INPUTS)
        rest = (1 - strength) * F.cross_entropy(logits, LABELS)
        return rest + strength * squared_error(logits, LABELS)

    torch.testing.assert_close(trained, after_one_step(loss), rtol=0, atol=1e-6)
    # The log value is the new loss without its share.
    expected = squared_error(Host()(INPUTS), LABELS)
    torch.testing.assert_close(run.callback_metrics["reg/squared_error"], expected)


def test_a_loss_with_other_terms_is_refused_unless_told_what_to_do():
    with pytest.raises(RegularizationError, match=r'SquaredError.*replaces="term"'):
        one_step(SquaredError(), TwoTerms())


def test_term_keeps_the_other_terms():
    trained, _ = one_step(SquaredError(replaces="term"), TwoTerms())

    def loss(module):
        other = 0.1 * module.net[0](INPUTS).square().mean()
        return squared_error(module(INPUTS), LABELS) + other

    torch.testing.assert_close(trained, after_one_step(loss, TwoTerms()), rtol=0, atol=1e-6)


def test_loss_drops_the_users_loss():
    trained, _ = one_step(SquaredError(replaces="loss"), TwoTerms())
    expected = after_one_step(lambda m: squared_error(m(INPUTS), LABELS), TwoTerms())
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)


def test_ignored_positions_have_no_row():
    seen = []

    class Rows(SquaredError):
        def losses(self, step, logits, distribution):
            seen.append((logits, distribution))
            return super().losses(step, logits, distribution)

    class Tagger(Host):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0].view(-1, 2, 8))
            labels = batch[1].view(-1, 2).clone()
            labels[0, 1] = -100
            loss = F.cross_entropy(logits.transpose(1, 2), labels)
            return {"loss": loss, "logits": logits, "targets": labels}

    one_step(Rows(), Tagger())
    kept = torch.arange(64) != 1
    torch.testing.assert_close(seen[0][0], Host()(INPUTS)[kept])
    assert torch.equal(seen[0][1], F.one_hot(LABELS, CLASSES)[kept].float())


def test_a_schedule_moves_the_share():
    start = weights(Host())
    early, _ = one_step(SquaredError(LinearSchedule(0.0, 1.0), replaces="loss"))
    plain, _ = fit([], batch_size=64, max_epochs=1)
    # At step 0 the share is 0.
    assert torch.equal(early, weights(plain))
    assert not torch.equal(early, start)


@pytest.mark.parametrize(
    "arguments", [{"strength": 1.5}, {"strength": -0.1}, {"replaces": "everything"}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match=r"SquaredError.*Try: SquaredError"):
        SquaredError(**arguments)
