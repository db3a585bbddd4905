"""Uncertainty over members against SciPy and torch-uncertainty."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torchmetrics import MetricCollection

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    EnsembleEntropy,
    ExpectedEntropy,
    MutualInformation,
    VariationRatio,
    ensemble_entropy,
    expected_entropy,
    mutual_information,
    variation_ratio,
)

_rng = np.random.default_rng(3)
M, N, C = 7, 50, 4
LOGITS = _rng.normal(size=(M, N, C)) * 2
P = np.exp(LOGITS) / np.exp(LOGITS).sum(2, keepdims=True)
KINDS = [EnsembleEntropy, ExpectedEntropy, MutualInformation, VariationRatio]
TOTAL = scipy_entropy(P.mean(0), axis=1).mean()
EXPECTED = scipy_entropy(P, axis=2).mean()


def votes():
    return np.stack([np.bincount(P[:, i].argmax(1), minlength=C) for i in range(N)])


def test_entropies_and_their_difference_equal_scipy():
    given = torch.tensor(LOGITS)
    assert float(ensemble_entropy(given, from_logits=True)) == pytest.approx(TOTAL, abs=1e-12)
    assert float(expected_entropy(given, from_logits=True)) == pytest.approx(EXPECTED, abs=1e-12)
    bald = mutual_information(given, from_logits=True)
    assert float(bald) == pytest.approx(TOTAL - EXPECTED, abs=1e-12)


def test_variation_ratio_counts_votes():
    expected = (1 - votes().max(1) / M).mean()
    value = variation_ratio(torch.tensor(LOGITS), from_logits=True)
    assert float(value) == pytest.approx(expected, abs=1e-12)


def test_the_mode_of_the_votes_is_not_the_top_of_the_mean():
    # Two members lean to class 0, one is sure of class 1: the mean says 1, the votes say 0.
    members = torch.tensor([[[0.55, 0.45]], [[0.55, 0.45]], [[0.0, 1.0]]])
    assert float(variation_ratio(members, from_logits=False)) == pytest.approx(1 / 3)


def test_equals_torch_uncertainty_where_it_is_the_same():
    peers = pytest.importorskip("torch_uncertainty.metrics.classification")
    metric = peers.MutualInformation()
    metric.update(torch.tensor(P).transpose(0, 1))
    bald = mutual_information(torch.tensor(P), from_logits=False)
    assert float(bald) == pytest.approx(float(metric.compute()), abs=1e-6)
    entropy = peers.Entropy()
    entropy.update(torch.tensor(P).transpose(0, 1))
    own = expected_entropy(torch.tensor(P), from_logits=False)
    assert float(own) == pytest.approx(float(entropy.compute()), abs=1e-6)


def test_members_that_agree_have_only_expected_entropy():
    same = torch.tensor(LOGITS[:1]).expand(5, N, C)
    assert float(mutual_information(same, from_logits=True)) == pytest.approx(0, abs=1e-12)
    assert float(variation_ratio(same, from_logits=True)) == 0.0


def test_sure_members_that_all_differ_have_log_m():
    members = torch.eye(4).view(4, 1, 4)
    assert float(mutual_information(members, from_logits=False)) == pytest.approx(math.log(4))
    assert float(variation_ratio(members, from_logits=False)) == pytest.approx(0.75)


def test_the_order_of_members_makes_no_difference():
    one = mutual_information(torch.tensor(LOGITS), from_logits=True)
    other = mutual_information(torch.tensor(LOGITS[::-1].copy()), from_logits=True)
    assert float(one) == pytest.approx(float(other), abs=1e-12)


def test_a_collection_counts_once():
    metrics = MetricCollection([kind(from_logits=True) for kind in KINDS])
    metrics.update(torch.tensor(LOGITS))
    assert len(metrics.compute_groups) == 1
    values = metrics.compute()
    assert float(values["ExpectedEntropy"] + values["MutualInformation"]) == pytest.approx(
        float(values["EnsembleEntropy"]), abs=1e-12
    )


def test_pixels_are_samples():
    dense = torch.tensor(LOGITS).view(M, 5, 2, 5, C).movedim(-1, 2)
    assert dense.shape == (M, 5, C, 2, 5)
    assert float(ensemble_entropy(dense, from_logits=True)) == pytest.approx(TOTAL, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_prediction_in_place_of_members_is_refused(kind):
    with pytest.raises(ArgumentError, match="members first"):
        kind(from_logits=True).update(torch.tensor(LOGITS[0]))


def test_samples_first_is_refused_where_targets_show_it():
    metric = VariationRatio(from_logits=True, ignore_index=-100)
    with pytest.raises(ArgumentError, match="transpose"):
        metric.update(torch.tensor(LOGITS).transpose(0, 1), torch.zeros(N).long())


def test_a_member_without_any_possible_class_is_invalid():
    given = torch.tensor(LOGITS)
    given[2, 4] = -math.inf
    metric = EnsembleEntropy(from_logits=True)
    metric.update(given)
    assert int(metric.invalid) == 1
    kept = np.arange(N) != 4
    assert float(metric.value()) == pytest.approx(
        scipy_entropy(P.mean(0)[kept], axis=1).mean(), abs=1e-12
    )
