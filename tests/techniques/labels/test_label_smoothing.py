"""Label smoothing: the formula, the native option of torch, and the optimum that it moves."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine import ArgumentError, ConflictError
from lightning_reg.techniques.labels.acls import ACLS
from lightning_reg.techniques.labels.label_smoothing import LabelSmoothing, label_smoothing
from tests.engine.simple import Host, fit, weights


def test_the_share_goes_to_all_classes_and_rows_still_sum_to_one():
    rows = np.array([[0.0, 1.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]])
    smoothed = label_smoothing(torch.from_numpy(rows), 0.2)
    expected = 0.8 * rows + 0.2 * np.full((2, 4), 0.25)
    np.testing.assert_allclose(smoothed.numpy(), expected, atol=1e-15)
    np.testing.assert_allclose(smoothed.sum(1).numpy(), 1.0, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_training_equals_the_native_option_of_the_loss(smoothing):
    class Native(Host):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x), y, label_smoothing=smoothing)

    ours, _ = fit([LabelSmoothing(smoothing)])
    native, _ = fit([], module=Native())
    torch.testing.assert_close(weights(ours), weights(native), rtol=0, atol=1e-6)


def test_the_best_logit_gap_is_finite_and_in_closed_form():
    """At the optimum p = q': the gap is log((1 - e + e/K) / (e/K)), infinite without smoothing."""
    target = label_smoothing(torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), 0.1)
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], 2.0)
    for _ in range(1000):
        optimizer.zero_grad()
        (-(target * logits.log_softmax(1)).sum()).backward()
        optimizer.step()
    gap = float(logits[0, 0] - logits[0, 1])
    assert abs(gap - math.log((0.9 + 0.1 / 3) / (0.1 / 3))) < 1e-5


def test_labels_are_not_smoothed_twice():
    with pytest.raises(ConflictError, match="smoothing would count twice"):
        fit([LabelSmoothing(0.1), ACLS(0.1)])


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan"), "0.1"])
def test_bad_arguments_are_refused(smoothing):
    with pytest.raises(ArgumentError, match="LabelSmoothing"):
        LabelSmoothing(smoothing)
