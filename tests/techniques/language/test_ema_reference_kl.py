"""A KL divergence to a moving average: its value, and how the reference follows."""

import math

import pytest
import torch

from lightning_reg.techniques.language.ema_reference_kl import EMAReferenceKL, ema_reference_kl
from tests.engine.simple import INPUTS, fit

_generator = torch.Generator().manual_seed(0)
LOGITS, REFERENCE = (torch.randn(7, 5, dtype=torch.float64, generator=_generator) for _ in range(2))


def test_equals_torch_distributions():
    p, q = (torch.distributions.Categorical(logits=z) for z in (LOGITS, REFERENCE))
    expected = torch.distributions.kl_divergence(p, q) - 0.3 * p.entropy()
    torch.testing.assert_close(
        ema_reference_kl(LOGITS, REFERENCE, 0.3), expected, atol=1e-12, rtol=0
    )


def test_a_copy_is_at_no_distance_and_uniform_entropy_is_log_c():
    assert ema_reference_kl(LOGITS, LOGITS).abs().max() < 1e-14
    uniform = torch.zeros(1, 8)
    assert ema_reference_kl(uniform, uniform, 1.0).item() == pytest.approx(-math.log(8))


def test_the_reference_gets_no_gradient():
    z, reference = LOGITS.clone().requires_grad_(), REFERENCE.clone().requires_grad_()
    ema_reference_kl(z, reference, 0.1).sum().backward()
    assert reference.grad is None
    assert z.grad.abs().sum() > 0


def test_a_class_that_both_exclude_adds_nothing():
    z, reference = LOGITS.clone(), REFERENCE.clone()
    z[:, 2] = reference[:, 2] = -torch.inf
    z.requires_grad_()
    value = ema_reference_kl(z, reference, 0.2)
    kept = [0, 1, 3, 4]
    expected = ema_reference_kl(LOGITS[:, kept], REFERENCE[:, kept], 0.2)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    value.sum().backward()
    assert z.grad.isfinite().all()


def entropy_and_distance(technique):
    """The trained model's entropy, and the logged divergence at the end."""
    callbacks = [] if technique is None else [technique]
    module, trainer = fit(callbacks, max_epochs=15)
    with torch.no_grad():
        logs = module(INPUTS).log_softmax(1)
    entropy = -(logs.exp() * logs).sum(1).mean().item()
    return entropy, float(trainer.callback_metrics.get("reg/ema_reference_kl", math.nan))


def test_a_moving_reference_stays_near_while_a_fixed_one_is_left_behind():
    kept = {"strength": 1e-6, "entropy_bonus": 0.0}
    _, moving = entropy_and_distance(EMAReferenceKL(**kept, decay=0.8))
    _, fixed = entropy_and_distance(EMAReferenceKL(**kept, decay=1.0))
    assert 0 <= moving < 0.2 * fixed


def test_the_bonus_keeps_entropy_up():
    plain, _ = entropy_and_distance(None)
    kept, _ = entropy_and_distance(EMAReferenceKL(0.5, entropy_bonus=1.0, decay=0.9))
    assert kept > plain + 0.1


def test_the_average_moves_once_per_optimizer_step():
    technique = EMAReferenceKL(0.0, entropy_bonus=0.0, decay=0.5)
    technique.strength = 1e-12
    module, trainer = fit(
        [technique], max_epochs=1, accumulate_grad_batches=2, limit_train_batches=2
    )
    assert trainer.global_step == 1
    before = type(module)()
    for own, start, end in zip(
        technique.teacher.network.parameters(),
        before.parameters(),
        module.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(own, (start + end) / 2, atol=1e-6, rtol=0)
