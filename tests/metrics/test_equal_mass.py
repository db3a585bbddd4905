"""Bins of equal mass against NumPy, the authors' code, and exact expectations."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    EqualMassCalibrationError,
    SweepCalibrationError,
    equal_mass_calibration_error,
    sweep_calibration_error,
)
from lightning_reg.metrics.fine_histogram import Cells, cells_of_samples
from lightning_reg.metrics.mass_bins import sweep
from tests.metrics.order_data import CONFIDENCE, CORRECT, TIED, adversarial, binary, filled


def textbook(confidence, correct, n_bins, norm, orders=1):
    """Sort, cut, average; ties by the mean bin over many random orders."""
    n = len(confidence)
    index = np.floor(np.arange(n) * n_bins / n).astype(int)
    accuracy = np.zeros(n_bins)
    rng = np.random.default_rng(0)
    for _ in range(orders):
        order = np.lexsort((rng.random(n), confidence))
        accuracy += np.array([correct[order][index == b].mean() for b in range(n_bins)]) / orders
    mean = np.array([np.sort(confidence)[index == b].mean() for b in range(n_bins)])
    share, gap = np.bincount(index) / n, np.abs(accuracy - mean)
    return {
        "l1": (share * gap).sum(),
        "l2": np.sqrt((share * gap**2).sum()),
        "max": gap.max(),
    }[norm]


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("n_bins", [1, 7, 15, 200])
def test_equals_the_textbook(norm, n_bins):
    found = binary(equal_mass_calibration_error, CONFIDENCE, CORRECT, n_bins=n_bins, norm=norm)
    assert abs(found - textbook(CONFIDENCE, CORRECT, n_bins, norm)) < 1e-12


def test_tied_predictions_share_the_edge_of_a_bin():
    found = binary(equal_mass_calibration_error, TIED, CORRECT, n_bins=7)
    assert found == pytest.approx(textbook(TIED, CORRECT, 7, "l1", orders=20000), abs=1e-3)
    # One level in two bins: both have the accuracy of the whole.
    level = np.full(10, 0.7)
    correct = np.r_[np.ones(5), np.zeros(5)]
    assert binary(equal_mass_calibration_error, level, correct, n_bins=2) == pytest.approx(0.2)


def test_the_order_of_tied_samples_changes_nothing():
    wanted = binary(equal_mass_calibration_error, TIED, CORRECT)
    for order in (np.argsort(CORRECT), np.argsort(-CORRECT)):
        found = binary(equal_mass_calibration_error, TIED[order], CORRECT[order])
        assert abs(found - wanted) < 1e-13


def test_the_authors_code():
    """google-research@5b09c22, caltrain/calibration_metrics.py: em_ece_bin and em_ece_sweep."""
    found = binary(equal_mass_calibration_error, CONFIDENCE, CORRECT)
    assert abs(found - 0.11337214554612825) < 1e-12
    found = binary(equal_mass_calibration_error, CONFIDENCE, CORRECT, norm="l2")
    assert abs(found - 0.14228753816609102) < 1e-12
    found = binary(sweep_calibration_error, CONFIDENCE, CORRECT, norm="l1")
    assert abs(found - 0.10620793468221887) < 1e-12
    found = binary(sweep_calibration_error, CONFIDENCE, CORRECT)
    assert abs(found - 0.11788656642962692) < 1e-12


def test_more_bins_than_predictions_leave_bins_empty():
    found = binary(equal_mass_calibration_error, CONFIDENCE[:3], CORRECT[:3], n_bins=10)
    assert found == pytest.approx(np.abs(CONFIDENCE[:3] - CORRECT[:3]).mean())


def test_the_debiased_square_is_unbiased():
    """Over all outcomes of 12 labels of probability 0.5 at confidence 0.9, by enumeration."""
    right = np.arange(13)
    squares = {}
    for debiased in (False, True):
        squares[debiased] = [
            binary(
                equal_mass_calibration_error,
                np.full(12, 0.9),
                (np.arange(12) < k).astype(float),
                n_bins=1,
                norm="l2",
                debiased=debiased,
            )
            ** 2
            for k in right
        ]
    weights = binom.pmf(right, 12, 0.5)
    raw = (0.9 - right / 12) ** 2 - right / 12 * (1 - right / 12) / 11
    assert raw @ weights == pytest.approx(0.16)
    np.testing.assert_allclose(squares[True], np.maximum(raw, 0), atol=1e-12)
    assert np.array(squares[False]) @ weights == pytest.approx(0.16 + 0.25 / 12)


def test_a_calibrated_model_has_less_debiased_error():
    confidence, correct = adversarial()["calibrated"]
    biased = binary(equal_mass_calibration_error, confidence, correct, norm="l2")
    debiased = binary(equal_mass_calibration_error, confidence, correct, norm="l2", debiased=True)
    assert debiased < biased / 2


def test_the_sweep_ends_before_accuracy_falls():
    cells = cells_of_samples(torch.tensor(CONFIDENCE), torch.tensor(CORRECT).double())
    assert sweep(cells, 4096)[0] == 6
    assert sweep(cells, 4)[0] == 4


def test_the_sweep_of_a_perfect_order_does_not_run_through_all_bins():
    confidence = np.linspace(0.01, 0.99, 100_000)
    correct = (confidence > 0.5).astype(float)
    gap = np.abs(correct - confidence)
    # Every number of bins is monotonic, so 4096 are taken at once.
    found = binary(sweep_calibration_error, confidence, correct, norm="l1")
    assert found == pytest.approx(gap.mean(), abs=1e-3)


def test_a_sweep_that_the_cells_cannot_decide_has_no_bound():
    confidence, correct = adversarial()["one cell, wrong before right"]
    metric = SweepCalibrationError(from_logits=False, task="binary", resolution=8)
    assert float(filled(metric, confidence, correct).error_bound()) == float("inf")


def test_a_fall_that_an_order_within_the_cells_could_undo_is_not_certain():
    """Two cells of 3 and 5 predictions; two bins cut the second one after 1 of its 5."""
    lower, upper = torch.tensor([[0.1, 0.6], [0.5, 0.9]], dtype=torch.float64)
    counts = torch.tensor([3, 5])
    for correct, certain in (([3.0, 2.0], True), ([2.0, 3.0], False)):
        correct = torch.tensor(correct, dtype=torch.float64)
        confidence = counts * (lower + upper) / 2
        cells = Cells(counts, confidence, correct, correct * 0.3, lower, upper)
        assert sweep(cells, 100) == (1, certain)


def test_bins_are_drawn_from_the_state():
    metric = EqualMassCalibrationError(from_logits=False, task="binary", n_bins=2)
    _, axes = filled(metric, np.array([0.1, 0.3, 0.6, 0.8]), np.array([0, 1, 1, 1])).plot()
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[0.2, 0.5], [0.7, 1.0]], atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_bins": 0}, "n_bins"),
        ({"n_bins": 2.0}, "n_bins"),
        ({"norm": "l3"}, "l1, l2, max"),
        ({"debiased": True}, 'norm="l2"'),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        EqualMassCalibrationError(from_logits=True, **arguments)
