"""Weights are of the joint batch, of mean one, one a sample, and leave the scale of the loss."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.mechanisms.sample_reweighting import SampleReweighting
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, fit, trainer, weights


class Proportional(SampleReweighting):
    """Weights that are the losses; keeps what it saw and what became of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.joint, self.given = [], []

    def weights(self, step, losses):
        self.joint.append(losses)
        return losses

    def sample_weights(self, step, losses):
        self.given.append(super().sample_weights(step, losses))
        return self.given[-1]


class Equal(SampleReweighting):
    def weights(self, step, losses):
        return torch.full_like(losses, 7.0)


def per_sample(module=None):
    return F.cross_entropy((module or Host())(INPUTS), LABELS, reduction="none")


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_loss_is_the_mean_with_weights_of_mean_one(strength):
    trained, run = fit([Proportional(strength)], batch_size=64, max_epochs=1)
    module = Host()
    losses = per_sample(module)
    w = losses.detach() / losses.detach().mean()
    ((1 - strength) * losses.mean() + strength * (w * losses).mean()).backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    torch.testing.assert_close(weights(trained), weights(module), rtol=0, atol=1e-6)
    # The log value is the effective sample size, whatever the strength.
    expected = (w.sum() ** 2 / w.square().sum() / 64).item()
    assert run.callback_metrics["reg/proportional"].item() == pytest.approx(expected, abs=1e-6)


def test_equal_weights_change_nothing():
    ours, plain = fit([Equal()])[0], fit([])[0]
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-6)


def test_all_tokens_of_a_sequence_get_its_weight():
    class Tagger(Host):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0].view(16, 4, 8))
            labels = batch[1].view(16, 4).clone()
            labels[0, 1:], labels[1] = -100, -100
            loss = F.cross_entropy(logits.transpose(1, 2), labels)
            return {"loss": loss, "logits": logits, "targets": labels}

    technique = Proportional()
    fit([technique], module=Tagger(), batch_size=64, max_epochs=1)
    losses = per_sample().detach().view(16, 4)
    # One token counts in the first sequence, none in the second.
    means = torch.cat([losses[0, :1], losses[2:].mean(1)])
    torch.testing.assert_close(technique.joint[0], means)
    expected = (means / means.mean()).repeat_interleave(torch.tensor([1] + [4] * 14))
    torch.testing.assert_close(technique.given[0], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_makes_all_weights_one(bad):
    class Breaks(Proportional):
        def weights(self, step, losses):
            return super().weights(step, losses * bad)

    technique = Breaks()
    fit([technique], batch_size=64, max_epochs=1)
    assert torch.equal(technique.given[0], torch.ones(64))


def test_losses_of_zero_make_all_weights_one():
    class Nothing(Proportional):
        def weights(self, step, losses):
            return super().weights(step, losses * 0.0)

    technique = Nothing()
    fit([technique], batch_size=64, max_epochs=1)
    assert torch.equal(technique.given[0], torch.ones(64))


@pytest.mark.parametrize("arguments", [{"strength": 2.0}, {"replaces": "all"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="Equal"):
        Equal(**arguments)


# ---------------------------------------------------------------------- ranks


def train_on_ranks(shares):
    share = shares[torch.distributed.get_rank()]
    technique = Proportional()
    run = rank_trainer(callbacks=[technique], max_epochs=1, use_distributed_sampler=False)
    module = Host()
    run.fit(module, DataLoader(TensorDataset(INPUTS[share], LABELS[share]), batch_size=64))
    return technique.given[0], weights(module), run.callback_metrics["reg/proportional"]


def test_weights_are_those_of_the_joint_batch(ranks):
    shares = (slice(0, 20), slice(20, 64))
    (first, _, value), (second, _, other) = ranks.run(train_on_ranks, shares)
    losses = per_sample().detach()
    expected = losses / losses.mean()
    torch.testing.assert_close(torch.cat([first, second]), expected)
    assert value == other


def test_two_ranks_train_as_one_process_with_the_joint_batch(ranks):
    shares = (slice(0, 32), slice(32, 64))
    (_, first, _), (_, second, _) = ranks.run(train_on_ranks, shares)
    module, run = Host(), trainer([Proportional()], max_epochs=1)
    run.fit(module, DataLoader(TensorDataset(INPUTS, LABELS), batch_size=64))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weights(module), rtol=0, atol=1e-6)
