"""Confidence penalty: formula, threshold, and what it does to a classifier."""

import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.outputs.confidence_penalty import (
    ConfidencePenalty,
    confidence_penalty,
)
from tests.engine.simple import INPUTS, fit

LOGITS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2


def entropy(logits):
    z = logits.numpy()
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1)


def test_value_is_the_negative_entropy():
    np.testing.assert_allclose(confidence_penalty(LOGITS).numpy(), -entropy(LOGITS), atol=1e-12)


def test_threshold_leaves_unsure_predictions_alone():
    threshold = float(np.median(entropy(LOGITS)))
    expected = np.maximum(0, threshold - entropy(LOGITS))
    assert 0 < (expected > 0).sum() < len(LOGITS)
    np.testing.assert_allclose(confidence_penalty(LOGITS, threshold).numpy(), expected, atol=1e-12)


def test_threshold_gives_unsure_predictions_no_gradient():
    z = torch.tensor([[0.0, 0.0], [9.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(confidence_penalty(z, 0.1).sum(), z)
    assert (gradient[0] == 0).all()
    # The sure prediction is pulled back: descent lowers the larger logit.
    assert gradient[1, 0] > 0 > gradient[1, 1]


def test_gradients_agree_with_finite_differences():
    z = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(confidence_penalty, (z,))
    assert torch.autograd.gradcheck(lambda z: confidence_penalty(z, 1.2), (z,))


def test_training_under_a_strong_penalty_ends_near_the_uniform_distribution():
    # Optimum for strength -> infinity: all classes equally likely, H = log 4.
    plain, _ = fit(max_epochs=20)
    ours, run = fit([ConfidencePenalty(20.0)], max_epochs=20)
    with torch.no_grad():
        before = entropy(plain(INPUTS).double()).mean()
        after = entropy(ours(INPUTS).double()).mean()
    assert before < 1.2
    assert after == pytest.approx(np.log(4), abs=0.02)
    assert run.callback_metrics["reg/confidence_penalty"] == pytest.approx(-after, abs=0.02)


@pytest.mark.parametrize("arguments", [{"threshold": 0.0}, {"threshold": -1.0}, {"strength": -0.1}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="ConfidencePenalty"):
        ConfidencePenalty(**arguments)
