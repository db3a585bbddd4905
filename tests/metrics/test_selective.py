"""Risk and coverage against brute force over orders, closed forms, and other libraries."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    AURC,
    CoverageAtRisk,
    RiskAtCoverage,
    augrc,
    aurc,
    coverage_at_risk,
    excess_aurc,
    risk_at_coverage,
)
from lightning_reg.metrics.fine_histogram import cells_of_samples
from lightning_reg.metrics.ranking import Ranked, harmonic_step, risk_of_first
from tests.metrics.order_data import CONFIDENCE, CORRECT, TIED, binary, filled, two_classes

# Five predictions on three levels: 2! x 2! orders.
FEW = np.array([0.9, 0.8, 0.8, 0.6, 0.6])
FEW_CORRECT = np.array([1, 0, 1, 1, 0])


def risks(errors):
    """The risk of the first k, for each k."""
    return np.cumsum(errors) / np.arange(1, len(errors) + 1)


def orders(confidence, correct):
    """The errors in every order of falling confidence."""
    for order in itertools.permutations(range(len(confidence))):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            yield 1.0 - correct[list(order)]


def test_aurc_is_the_mean_risk():
    errors = 1 - CORRECT[np.argsort(-CONFIDENCE)]
    assert abs(binary(aurc, CONFIDENCE, CORRECT) - risks(errors).mean()) < 1e-12


@pytest.mark.parametrize("correct", [FEW_CORRECT, np.array([0.3, 0.9, 0.2, 0.5, 1.0])])
def test_aurc_of_ties_is_the_mean_over_their_orders(correct):
    expected = np.mean([risks(errors).mean() for errors in orders(FEW, correct)])
    assert abs(binary(aurc, FEW, correct) - expected) < 1e-12


def test_all_tied_is_the_error_rate():
    tied = np.full(200, 0.7)
    assert binary(aurc, tied, CORRECT) == pytest.approx(1 - CORRECT.mean(), abs=1e-12)


@pytest.mark.parametrize("function", [aurc, excess_aurc, augrc])
def test_the_order_of_tied_samples_changes_nothing(function):
    wanted = binary(function, TIED, CORRECT)
    for order in (np.argsort(CORRECT), np.argsort(-CORRECT)):
        assert abs(binary(function, TIED[order], CORRECT[order]) - wanted) < 1e-13


@pytest.mark.parametrize("start", [0, 1, 5, 31, 32, 40, 10**6])
@pytest.mark.parametrize("length", [1, 3, 1000])
def test_harmonic_numbers(start, length):
    found = float(harmonic_step(*torch.tensor([[start], [length]], dtype=torch.float64)))
    expected = sum(1 / k for k in range(start + 1, start + length + 1))
    assert found == pytest.approx(expected, rel=1e-12)


def test_errors_first_and_last_in_a_group_are_the_extremes():
    ranked = Ranked(torch.tensor([4.0, 2.0]), torch.tensor([1.4, 2.0]))
    first, last = ranked.sorted_within(True), ranked.sorted_within(False)
    assert first.sizes.tolist() == [1, 1, 2, 2]
    assert first.errors.tolist() == pytest.approx([1, 0.4, 0, 2])
    assert last.sizes.tolist() == [2, 1, 1, 2]
    assert last.errors.tolist() == pytest.approx([0, 0.4, 1, 2])


def test_a_billion_samples_keep_their_digits():
    metric = filled(AURC(from_logits=False, task="binary"), [0.9, 0.6], [1, 0])
    for _ in range(29):
        metric.merge_state(metric)
    # The integral of (1 - c) / c over the second half of coverage, as N grows.
    n = 2.0**30
    expected = 0.5 - 0.5 * np.log(2)
    assert float(metric.value()) == pytest.approx(expected, abs=2 / n)


@pytest.mark.parametrize("confidence", [CONFIDENCE, TIED])
def test_augrc_is_a_function_of_the_roc_curve(confidence):
    accuracy, area = CORRECT.mean(), roc_auc_score(CORRECT, confidence)
    expected = (1 - area) * accuracy * (1 - accuracy) + 0.5 * (1 - accuracy) ** 2
    assert abs(binary(augrc, confidence, CORRECT) - expected) < 1e-12


def test_excess_is_over_the_best_order():
    best = risks(np.sort(1 - CORRECT)).mean()
    excess = binary(excess_aurc, CONFIDENCE, CORRECT)
    assert abs(excess - (binary(aurc, CONFIDENCE, CORRECT) - best)) < 1e-12
    sorted_confidence = np.where(CORRECT == 1, 0.9, 0.6)
    assert binary(excess_aurc, sorted_confidence, CORRECT) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("coverage", [0.001, 0.2, 0.4, 0.41, 0.6, 0.99, 1.0])
def test_risk_at_coverage_is_the_mean_over_orders(coverage):
    accepted = int(np.ceil(coverage * 5))
    expected = np.mean([errors[:accepted].mean() for errors in orders(FEW, FEW_CORRECT)])
    found = binary(risk_at_coverage, FEW, FEW_CORRECT, coverage=coverage)
    assert abs(found - expected) < 1e-12


def test_a_share_that_is_a_whole_number_is_not_rounded_up():
    confidence, correct = np.linspace(0.99, 0.6, 100), np.r_[np.ones(7), np.zeros(93)]
    assert binary(risk_at_coverage, confidence, correct, coverage=0.07) == 0


@pytest.mark.parametrize("confidence", [CONFIDENCE, TIED, np.full(200, 0.7)])
@pytest.mark.parametrize("risk", [0.0, 0.1, 0.2, 0.25, 0.355, 0.4, 1.0])
def test_coverage_at_risk_is_the_largest_whose_risk_is_allowed(confidence, risk):
    ranked = Ranked.of(cells_of_samples(torch.tensor(confidence), torch.tensor(CORRECT).double()))
    of_all = risk_of_first(ranked, torch.arange(1.0, 201.0).double()).tolist()
    allowed = [k for k, r in enumerate(of_all, 1) if r <= risk + 1e-15]
    expected = max(allowed, default=0) / 200
    assert binary(coverage_at_risk, confidence, CORRECT, risk=risk) == pytest.approx(expected)


def test_logits_classes_and_scores_agree():
    wanted = binary(aurc, CONFIDENCE, CORRECT)
    probabilities = two_classes(CONFIDENCE)
    target = torch.tensor(CORRECT)
    assert float(aurc(probabilities, target, from_logits=False)) == pytest.approx(wanted)
    assert float(aurc(probabilities.log(), target, from_logits=True)) == pytest.approx(wanted)
    # Of the other class: the predicted class and its confidence are the same.
    assert binary(aurc, 1 - CONFIDENCE, 1 - CORRECT) == pytest.approx(wanted)
    logit = torch.tensor(CONFIDENCE).logit()
    value = aurc(logit, target, from_logits=True, task="binary")
    assert float(value) == pytest.approx(wanted)


def test_fd_shifts():
    """IML-DKFZ/fd-shifts@c4467ae, rc_stats.py: AUGRC and, without ties, nearly AURC."""
    assert abs(binary(augrc, CONFIDENCE, CORRECT) - 0.12486249999999999) < 1e-12
    assert abs(binary(augrc, TIED, CORRECT) - 0.12577500000000003) < 1e-12
    # Trapezoids, with the risk of the first prediction also before it: half a step of risk less.
    difference = binary(aurc, CONFIDENCE, CORRECT) - 0.1884677202679504
    assert difference == pytest.approx((1 - CORRECT.mean()) / 400, abs=1e-12)


def test_torch_uncertainty():
    """torch-uncertainty 0.13.0: risk and coverage agree, areas are trapezoids from k = 1 on."""
    assert abs(binary(risk_at_coverage, CONFIDENCE, CORRECT, coverage=0.8) - 0.30625) < 1e-6
    assert abs(binary(coverage_at_risk, CONFIDENCE, CORRECT, risk=0.2) - 0.505) < 1e-6
    first, last = 1 - CORRECT[np.argmax(CONFIDENCE)], 1 - CORRECT.mean()
    mean = (200 * binary(aurc, CONFIDENCE, CORRECT) - (first + last) / 2) / 199
    assert mean == pytest.approx(0.18941479426257177, abs=1e-6)


def test_the_curve_is_drawn_from_the_state():
    metric = filled(AURC(from_logits=False, task="binary"), FEW, FEW_CORRECT)
    _, axes = metric.plot()
    line = axes.lines[0].get_xydata()
    np.testing.assert_allclose(line, [[0.2, 0], [0.6, 1 / 3], [1, 0.4]], atol=1e-12)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (RiskAtCoverage, {"coverage": 0.0}),
        (RiskAtCoverage, {"coverage": 1.1}),
        (CoverageAtRisk, {"risk": -0.1}),
    ],
)
def test_shares_outside_their_range_are_refused(cls, arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        cls(from_logits=True, **arguments)
