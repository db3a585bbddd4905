"""The margin against NumPy, and its invariances."""

import numpy as np
import pytest
import torch

from lightning_reg.metrics import expected_accuracy, probability_margin
from tests.metrics.cases.data import BINARY_LOGITS, BINARY_TARGETS, LOGITS, SOFT, TARGETS


def by_hand(p, y):
    return np.mean([row[k] - np.delete(row, k).max() for row, k in zip(p, y, strict=True)])


def test_is_the_true_class_less_the_best_other():
    p = LOGITS.softmax(1).numpy()
    value = float(probability_margin(LOGITS, TARGETS, from_logits=True))
    assert value == pytest.approx(by_hand(p, TARGETS.numpy()), abs=1e-12)


def test_is_positive_exactly_where_the_prediction_is_right():
    signs = [
        float(probability_margin(x[None], y[None], from_logits=True)) > 0
        for x, y in zip(LOGITS, TARGETS, strict=True)
    ]
    accuracy = float(expected_accuracy(LOGITS, TARGETS, from_logits=True))
    assert sum(signs) / len(signs) == pytest.approx(accuracy)


def test_soft_targets_give_the_expectation_over_their_labels():
    expected = 0.0
    for k in range(LOGITS.shape[1]):
        p = LOGITS.softmax(1).numpy()
        margins = p[:, k] - np.delete(p, k, 1).max(1)
        expected += (SOFT[:, k].numpy() * margins).mean()
    value = float(probability_margin(LOGITS, SOFT, from_logits=True))
    assert value == pytest.approx(expected, abs=1e-12)


def test_a_binary_score_equals_its_two_classes():
    both = torch.stack([torch.zeros_like(BINARY_LOGITS), BINARY_LOGITS], 1)
    value = probability_margin(BINARY_LOGITS, BINARY_TARGETS, from_logits=True, task="binary")
    two = probability_margin(both, BINARY_TARGETS, from_logits=True)
    assert float(value) == pytest.approx(float(two), abs=1e-12)
