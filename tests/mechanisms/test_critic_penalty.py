"""Critic penalties in a GAN with two optimizers: where they act, and what they leave alone."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_reg.engine import (
    MissingSignalError,
    RegularizationError,
    UnsupportedError,
)
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.mechanisms.critic_penalty import CriticPenalty, critic_gradient
from lightning_reg.testing.ranks import rank_trainer
from tests.engine.simple import Host, weights
from tests.engine.simple import fit as fit_classifier
from tests.techniques.generative.gan import GAN, NOISE, POINTS, fit, loader, mlp


class Slope(CriticPenalty):
    """The squared gradient at real samples."""

    def values(self, critic, real, fake, generator):
        return critic_gradient(critic, real).square().sum(1)


class Between(CriticPenalty):
    """The squared gradient at random points; keeps the points."""

    needs = ("critic", "real", "fake")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drawn = []

    def values(self, critic, real, fake, generator):
        share = torch.rand(len(real), 1, generator=generator)
        self.drawn.append(share)
        return critic_gradient(critic, share * real + (1 - share) * fake).square().sum(1)


def reference(strength=0.5, epochs=2, size=16, every=1):
    """The GAN's training as a plain loop."""
    module = GAN()
    generator, critic = module.configure_optimizers()
    batch = 0
    for _ in range(epochs):
        for real, noise in zip(POINTS.split(size), NOISE.split(size), strict=True):
            fake = module.generator(noise).detach()
            loss = module.critic(fake).mean() - module.critic(real).mean()
            if batch % every == 0:
                score = torch.func.vmap(torch.func.grad(lambda x: module.critic(x[None]).sum()))
                loss = loss + every * strength * score(real).square().sum(1).mean()
            critic.zero_grad()
            loss.backward()
            critic.step()
            generator.zero_grad()
            (-module.critic(module.generator(noise)).mean()).backward()
            generator.step()
            batch += 1
    return weights(module)


def test_equals_a_plain_loop():
    module, _ = fit([Slope(0.5)])
    torch.testing.assert_close(weights(module), reference(), rtol=0, atol=1e-6)
    assert (weights(module) - reference(0.0)).abs().max() > 1e-2


@pytest.mark.parametrize("interval", [2, 3])
def test_lazy_penalty_acts_every_kth_batch_with_k_times_the_gradient(interval):
    module, _ = fit([Slope(0.5, interval=interval)])
    torch.testing.assert_close(weights(module), reference(every=interval), rtol=0, atol=1e-6)


def test_lazy_penalty_logs_the_plain_value():
    lazy, plain = (
        fit([Slope(0.5, interval=k)], epochs=1, limit_train_batches=1)[1].callback_metrics
        for k in (16, 1)
    )
    assert lazy["reg/slope"] == plain["reg/slope"] > 0


def test_the_generators_call_is_left_alone():
    # At learning rate 0 of the critic nothing else could reach the generator.
    class Still(GAN):
        def configure_optimizers(self):
            generator, _ = super().configure_optimizers()
            return generator, torch.optim.SGD(self.critic.parameters(), 0.0)

    ours, _ = fit([Slope(100.0)], module=Still())
    plain, _ = fit(module=Still())
    assert torch.equal(weights(ours), weights(plain))


def test_gradients_reach_the_critic_only():
    generator = nn.Linear(3, 2)
    critic = mlp()
    value = critic_gradient(critic, generator(NOISE)).square().sum()
    value.backward()
    assert all(p.grad is None for p in generator.parameters())
    assert critic[0].weight.grad.abs().max() > 0


def test_statistics_and_random_numbers_are_as_without():
    drawn = []

    class Draws(GAN):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            drawn.append(torch.rand(()).item())

        def configure_optimizers(self):
            # At learning rate 0 the statistics could differ by additional calls only.
            return [torch.optim.SGD(m.parameters(), 0.0) for m in (self.generator, self.critic)]

    def run(techniques):
        middle = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5))
        module, _ = fit(techniques, module=Draws(critic=mlp(middle)))
        return module.critic[1][0]

    ours, plain = run([Between(1.0)]), run([])
    assert ours.num_batches_tracked == plain.num_batches_tracked == 3 * 8
    assert torch.equal(ours.running_mean, plain.running_mean)
    assert torch.equal(ours.running_var, plain.running_var)
    assert drawn[:8] == drawn[8:]


def test_every_call_draws_its_own_points():
    technique = Between(1.0)
    fit([technique], module=GAN(critic_steps=3), epochs=1)
    assert len(technique.drawn) == 3 * 4
    firsts = {draw[0].item() for draw in technique.drawn}
    assert len(firsts) == 12


def test_mixed_precision_does_not_change_the_penalty():
    exact = reference()
    bf16, _ = fit([Slope(0.5)], precision="bf16-mixed")
    assert (weights(bf16) - exact).abs().max() < 1e-2
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fp16, _ = fit([Slope(0.5)], plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert (weights(fp16) - exact).abs().max() < 1e-3


def test_half_precision_samples_meet_float32_weights():
    class Halves(GAN):
        def regularize(self, loss, **signals):
            if signals:
                signals["real"] = signals["real"].bfloat16()
            return super().regularize(loss, **signals)

    module, _ = fit([Slope(0.5)], module=Halves(), precision="bf16-mixed")
    assert (weights(module) - reference()).abs().max() < 1e-2


def test_double_precision_is_kept():
    class Doubles(GAN):
        def training_step(self, batch, batch_idx):
            return super().training_step([t.double() for t in batch], batch_idx)

    module, _ = fit([Slope(0.5)], module=Doubles(), precision="64-true")
    assert weights(module).dtype == torch.float64
    torch.testing.assert_close(weights(module).float(), reference(), rtol=0, atol=1e-6)


def test_critics_with_attention_and_recurrence_are_differentiated_twice():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.MultiheadAttention(2, 1, batch_first=True)
            self.walk = nn.GRU(2, 4, batch_first=True)
            self.head = nn.Linear(4, 1)

        def forward(self, x):
            tokens = torch.stack([x, 2 * x], 1)
            mixed, _ = self.mix(tokens, tokens, tokens, need_weights=False)
            return self.head(self.walk(mixed)[0][:, -1])

    module, run = fit([Slope(0.5)], module=GAN(critic=Sequence()), epochs=1)
    assert torch.isfinite(weights(module)).all()
    assert run.callback_metrics["reg/slope"] > 0


# ---------------------------------------------------------------------- refusals


def test_automatic_optimization_is_refused_before_training():
    with pytest.raises(UnsupportedError, match=r"Slope.*self\.regularize\(loss, critic="):
        fit_classifier([Slope(0.5)], module=Host())


def test_a_step_that_hands_nothing_over_is_named():
    with pytest.raises(RegularizationError, match=r"Slope: was not applied.*critic=.*real="):
        fit([Slope(0.5)], module=GAN(hand_over=False))


def test_a_compiled_critic_is_refused():
    critic = torch.compile(mlp(), backend="aot_eager")
    with pytest.raises(UnsupportedError, match=r"Slope.*torch\.compile"):
        fit([Slope(0.5)], module=GAN(critic=critic))


@pytest.mark.parametrize("scores", [lambda x: (x, x), lambda x: x.sum()[None]])
def test_a_critic_without_one_score_per_sample_is_refused(scores):
    class Odd(GAN):
        def regularize(self, loss, **signals):
            if signals:
                signals["critic"] = scores
            return super().regularize(loss, **signals)

    with pytest.raises(RegularizationError, match=r"one score per sample"):
        fit([Slope(0.5)], module=Odd())


def test_samples_that_are_no_floats_are_refused():
    class Bytes(GAN):
        def regularize(self, loss, **signals):
            if signals:
                signals["real"] = signals["real"].long()
            return super().regularize(loss, **signals)

    with pytest.raises(RegularizationError, match=r"`real` as one tensor of floats.*int64"):
        fit([Slope(0.5)], module=Bytes())


@pytest.mark.parametrize("interval", [0, 2.0, True])
def test_bad_intervals_are_refused(interval):
    with pytest.raises(ArgumentError, match=r"Slope.*interval"):
        Slope(0.5, interval=interval)


def test_missing_signals_are_missing_signal_errors():
    class Asks(Slope):
        needs = ("critic",)

    class NoReal(GAN):
        def regularize(self, loss, real=None, **signals):
            return super().regularize(loss, **signals)

    with pytest.raises(MissingSignalError, match=r"Asks.*real"):
        fit([Asks(0.5)], module=NoReal())


# ---------------------------------------------------------------------- ranks


def train_on_ranks():
    rank = torch.distributed.get_rank()
    module = GAN()
    run = rank_trainer(
        callbacks=[Slope(0.5, interval=2)],
        strategy="ddp_find_unused_parameters_true",
        max_epochs=2,
        use_distributed_sampler=False,
    )
    run.fit(module, loader(slice(rank, None, 2), batch_size=8))
    return weights(module)


def test_two_ranks_equal_the_joint_batch(ranks):
    first, second = ranks.run(train_on_ranks)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, reference(every=2), rtol=0, atol=1e-6)


UNEQUAL = (slice(0, 3), slice(3, 16))


def value_on_unequal_ranks():
    run = rank_trainer(
        callbacks=[Slope(0.5)],
        strategy="ddp_find_unused_parameters_true",
        max_epochs=1,
        use_distributed_sampler=False,
    )
    run.fit(GAN(), loader(UNEQUAL[torch.distributed.get_rank()], batch_size=16))
    return run.callback_metrics["reg/slope"].item()


def test_each_sample_of_unequal_ranks_counts_once(ranks):
    critic = GAN().critic
    values = critic_gradient(critic, POINTS[:16]).square().sum(1).detach()
    of_ranks = (values[UNEQUAL[0]].mean() + values[UNEQUAL[1]].mean()) / 2
    assert (values.mean() - of_ranks).abs() > 1e-3
    for value in ranks.run(value_on_unequal_ranks):
        assert value == pytest.approx(values.mean().item(), rel=1e-5)
