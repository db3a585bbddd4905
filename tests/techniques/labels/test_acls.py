"""ACLS: values of the official code, what it leaves alone, and the gap that it allows."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.labels.acls import ACLS, acls

LOGITS = torch.tensor(
    [[4.0, 1.0, -0.5, -3.0], [2.5, 0.3, -2.0, -2.2], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64
)
# cvlab-yonsei/ACLS@bbd8a37, calibrate/losses/acls.py, `ACLS(margin=1.0).get_reg` on LOGITS.
OFFICIAL_VALUE = 4.634777777777778
OFFICIAL_GRADIENT = [
    [2.0, -0.044444444444444446, -0.07777777777777778, -0.13333333333333333],
    [1.0, -0.026666666666666672, -0.07777777777777778, -0.08222222222222222],
    [0.0, 0.0, 0.0, 0.0],
]


def gradient(logits: torch.Tensor, **kwargs) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    acls(logits, **kwargs).mean().backward()
    return logits.grad


def test_value_and_gradient_are_those_of_the_official_code():
    value = acls(LOGITS, margin=1.0, reference="zero").mean()
    torch.testing.assert_close(float(value), OFFICIAL_VALUE, rtol=0, atol=1e-12)
    found = gradient(LOGITS, margin=1.0, reference="zero")
    expected = torch.tensor(OFFICIAL_GRADIENT, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_first_term_measures_from_the_least_logit():
    value = acls(LOGITS, margin=1.0, negative=0.0, reference="minimum")
    expected = torch.tensor([(4 + 3 - 1) ** 2, (2.5 + 2.2 - 1) ** 2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(value, expected)


def test_a_shift_of_the_logits_changes_nothing_from_the_least_one():
    shifted = LOGITS + 7.0
    least = {"margin": 1.0, "reference": "minimum"}
    torch.testing.assert_close(acls(shifted, **least), acls(LOGITS, **least))
    torch.testing.assert_close(gradient(shifted, **least), gradient(LOGITS, **least))
    with_zero = acls(shifted, 1.0, reference="zero"), acls(LOGITS, 1.0, reference="zero")
    assert (with_zero[0] - with_zero[1]).abs().max() > 1


def test_inside_the_margin_nothing_is_penalized():
    for reference in ("zero", "minimum"):
        assert acls(LOGITS, margin=7.0, reference=reference).abs().max() == 0
        assert gradient(LOGITS, margin=7.0, reference=reference).abs().max() == 0


def test_the_largest_logit_is_pushed_down_and_the_others_up():
    found = gradient(LOGITS, margin=0.05)
    largest = F.one_hot(LOGITS.argmax(1), 4).bool()
    assert (found[largest] > 0).all()
    assert (found[~largest] < 0).all()


def test_the_largest_logit_gets_no_gradient_from_the_second_term():
    found = gradient(LOGITS, margin=0.05, positive=0.0)
    largest = F.one_hot(LOGITS.argmax(1), 4).bool()
    assert (found[largest] == 0).all()
    assert (found[~largest] < 0).all()


def test_the_gap_of_a_certain_label_ends_where_both_gradients_cancel():
    """Gradient flow on two logits: dg/dt = 2 sigmoid(-g) - 2 alpha (l1 + l2) (g - M)."""
    alpha, margin = 0.05, 1.0
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], 1.0)
    for _ in range(800):
        optimizer.zero_grad()
        loss = (
            F.cross_entropy(logits, torch.tensor([0]))
            + alpha * acls(logits, margin, reference="minimum").mean()
        )
        loss.backward()
        optimizer.step()
    low, high = 0.0, 50.0
    for _ in range(200):
        gap = (low + high) / 2
        pull = 1 / (1 + math.exp(gap)) - alpha * (1.0 + 0.1) * max(0.0, gap - margin)
        low, high = (gap, high) if pull > 0 else (low, gap)
    assert abs(float(logits[0, 0] - logits[0, 1]) - gap) < 1e-6


@pytest.mark.parametrize(
    "arguments", [{"strength": -1.0}, {"margin": -1.0}, {"negative": -0.1}, {"reference": "mean"}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="ACLS"):
        ACLS(**arguments)
