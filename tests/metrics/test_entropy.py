"""Entropy, likelihood and accuracy against closed forms."""

import math

import pytest
import torch
from scipy.stats import entropy as scipy_entropy

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    ExpectedAccuracy,
    NegativeLogLikelihood,
    PredictiveEntropy,
    predictive_entropy,
)

LOGITS = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
TARGETS = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(1))


def test_equals_scipy_in_nats():
    reference = scipy_entropy(LOGITS.softmax(1).numpy(), axis=1).mean()
    assert float(predictive_entropy(LOGITS, from_logits=True)) == pytest.approx(
        reference, abs=1e-12
    )
    given = predictive_entropy(LOGITS.softmax(1), from_logits=False)
    assert float(given) == pytest.approx(reference, abs=1e-12)


def test_uniform_is_log_c_and_normalized_one():
    assert float(predictive_entropy(torch.zeros(3, 7), from_logits=True)) == pytest.approx(
        math.log(7)
    )
    value = predictive_entropy(torch.zeros(3, 7), from_logits=True, normalized=True)
    assert float(value) == pytest.approx(1.0, abs=1e-12)


def test_certainty_has_no_entropy_and_no_nan():
    certain = torch.tensor([[1.0, 0.0, 0.0]])
    assert float(predictive_entropy(certain, from_logits=False)) == 0.0
    assert float(predictive_entropy(certain.log(), from_logits=True)) == 0.0


def test_binary_scores_are_two_classes():
    p = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    pairs = torch.stack([1 - p, p], 1)
    expected = scipy_entropy(pairs.numpy(), axis=1).mean()
    value = predictive_entropy(p, from_logits=False, task="binary")
    assert float(value) == pytest.approx(expected, abs=1e-12)


def test_metric_is_the_mean_over_samples_not_over_batches():
    metric = PredictiveEntropy(from_logits=True)
    for part in LOGITS.split([50, 7, 3]):
        metric.update(part)
    expected = predictive_entropy(LOGITS, from_logits=True)
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-12)


def test_metric_leaves_out_ignored_positions():
    metric = PredictiveEntropy(from_logits=True, ignore_index=0)
    metric.update(LOGITS, TARGETS)
    expected = predictive_entropy(LOGITS[TARGETS != 0], from_logits=True)
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-12)


def entropy_on_rank():
    rank = torch.distributed.get_rank()
    metric = PredictiveEntropy(from_logits=True)
    metric.update(LOGITS.split([45, 15])[rank])
    return float(metric.compute())


def test_two_ranks_equal_one_process(ranks):
    expected = float(predictive_entropy(LOGITS, from_logits=True))
    assert ranks.run(entropy_on_rank) == pytest.approx([expected, expected], abs=1e-12)


def test_likelihood_is_the_cross_entropy():
    metric = NegativeLogLikelihood(from_logits=True)
    metric.update(LOGITS, TARGETS)
    expected = torch.nn.functional.cross_entropy(LOGITS, TARGETS)
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-12)


def test_likelihood_of_soft_targets_is_their_cross_entropy():
    soft = LOGITS.flip(0).softmax(1)
    metric = NegativeLogLikelihood(from_logits=False)
    metric.update(LOGITS.softmax(1), soft)
    expected = torch.nn.functional.cross_entropy(LOGITS, soft)
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-12)


def test_likelihood_ignores_the_logarithm_of_an_excluded_class():
    metric = NegativeLogLikelihood(from_logits=False)
    metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert float(metric.compute()) == 0.0


def test_binary_likelihood():
    logits, target = LOGITS[:, 0], (TARGETS > 2).double()
    metric = NegativeLogLikelihood(from_logits=True, task="binary")
    metric.update(logits, target)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-12)


def test_accuracy_counts_top_classes():
    metric = ExpectedAccuracy(from_logits=True)
    metric.update(LOGITS, TARGETS)
    expected = sum(int(LOGITS[i].argmax()) == int(TARGETS[i]) for i in range(60)) / 60
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-12)


def test_accuracy_under_soft_targets_is_an_expectation():
    metric = ExpectedAccuracy(from_logits=True)
    metric.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    assert float(metric.compute()) == pytest.approx((0.7 + 0.4) / 2, abs=1e-7)


def test_binary_accuracy():
    metric = ExpectedAccuracy(from_logits=True, task="binary")
    metric.update(torch.tensor([1.0, -1.0, 2.0]), torch.tensor([1, 0, 0]))
    assert float(metric.compute()) == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", [NegativeLogLikelihood, ExpectedAccuracy])
def test_targets_are_asked_for(kind):
    with pytest.raises(ArgumentError, match="needs targets"):
        kind(from_logits=True).update(LOGITS)
