"""The squared kernel calibration error against all pairs in NumPy and CalibrationErrors.jl."""

import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    SquaredKernelCalibrationError,
    squared_kernel_calibration_error,
)

_rng = np.random.default_rng(0)
PROBABILITIES = _rng.dirichlet(np.ones(4), 61)
TARGETS = _rng.integers(0, 4, 61)
DISTANCES = {
    "exponential": lambda d: np.sqrt((d**2).sum(-1)) / 0.7,
    "gaussian": lambda d: (d**2).sum(-1) / (2 * 0.7**2),
    "total_variation": lambda d: np.abs(d).sum(-1) / (2 * 0.7),
}


def pairs(probabilities, targets, kernel="exponential"):
    """The matrix of h, by the definition: the kernel of targets is 1 where they are equal."""
    k = np.exp(-DISTANCES[kernel](probabilities[:, None] - probabilities))
    same = targets[:, None] == targets
    of_first = probabilities[:, targets]
    return k * (same - of_first - of_first.T + probabilities @ probabilities.T)


def estimate(probabilities, targets, **arguments):
    return float(
        squared_kernel_calibration_error(
            torch.tensor(probabilities),
            torch.tensor(targets),
            from_logits=False,
            **{"bandwidth": 0.7, **arguments},
        )
    )


@pytest.mark.parametrize("kernel", DISTANCES)
def test_estimators_equal_the_definition(kernel):
    h = pairs(PROBABILITIES, TARGETS, kernel)
    found = estimate(PROBABILITIES, TARGETS, kernel=kernel, estimator="biased")
    assert abs(found - h.mean()) < 1e-12
    found = estimate(PROBABILITIES, TARGETS, kernel=kernel, estimator="unbiased")
    assert abs(found - (h.sum() - np.trace(h)) / (61 * 60)) < 1e-12


@pytest.mark.parametrize("size", [2, 7, 60, 100])
def test_blocks_pool_their_pairs(size):
    h, total, count = pairs(PROBABILITIES, TARGETS), 0.0, 0
    for first in range(0, 61, size):
        block = h[first : first + size, first : first + size]
        total += (block.sum() - np.trace(block)) / 2
        count += len(block) * (len(block) - 1) // 2
    found = estimate(PROBABILITIES, TARGETS, estimator="block", block_size=size)
    assert abs(found - total / count) < 1e-12


@pytest.mark.parametrize(
    ("targets", "unbiased", "biased"),
    [
        ([0, 1], 0, 0),
        ([0, 0], 0, 0.5),
        ([1, 0], -2 * np.exp(-1), 1 - np.exp(-1)),
        ([1, 1], 0, 0.5),
    ],
)
def test_calibration_errors_jl(targets, unbiased, biased):
    """devmotion/CalibrationErrors.jl@8dfa994, test/skce.jl, the two-dimensional example."""
    for estimator, value in (("unbiased", unbiased), ("block", unbiased), ("biased", biased)):
        found = estimate(
            np.eye(2), np.array(targets), kernel="gaussian", bandwidth=1.0, estimator=estimator
        )
        assert found == pytest.approx(value, abs=1e-12)
        # Two classes as one score.
        score = squared_kernel_calibration_error(
            torch.tensor([0.0, 1.0], dtype=torch.float64),
            torch.tensor(targets),
            from_logits=False,
            task="binary",
            kernel="gaussian",
            estimator=estimator,
        )
        assert float(score) == pytest.approx(value, abs=1e-12)


def test_it_sees_what_the_top_label_hides():
    """Right at the top label, and wrong about the rest."""
    probabilities = np.tile([0.5, 0.3, 0.2], (200, 1))
    calibrated = np.repeat([0, 1, 2], [100, 60, 40])
    swapped = np.repeat([0, 1, 2], [100, 40, 60])
    assert estimate(probabilities, calibrated, estimator="biased") == pytest.approx(0, abs=1e-12)
    assert estimate(probabilities, swapped, estimator="biased") == pytest.approx(0.02)


@pytest.mark.parametrize("estimator", ["unbiased", "block"])
def test_unbiased_estimates_of_a_calibrated_model_average_to_zero(estimator):
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        probabilities = rng.dirichlet(np.ones(3), 20)
        targets = (probabilities.cumsum(1) < rng.random((20, 1))).sum(1)
        found.append(estimate(probabilities, targets, estimator=estimator))
    found = np.array(found)
    assert (found < 0).any()
    assert abs(found.mean()) < 4 * found.std() / 20


def test_soft_targets_are_the_expectation_over_labels():
    """Of three samples, over all 27 labelings."""
    probabilities, soft = PROBABILITIES[:3, :3], _rng.dirichlet(np.ones(3), 3)
    probabilities = probabilities / probabilities.sum(1, keepdims=True)
    expected = 0.0
    for labels in np.ndindex(3, 3, 3):
        weight = np.prod(soft[np.arange(3), list(labels)])
        expected += weight * estimate(probabilities, np.array(labels))
    assert abs(estimate(probabilities, soft) - expected) < 1e-12


def test_the_biased_estimator_needs_labels():
    with pytest.raises(ArgumentError, match="unbiased"):
        estimate(PROBABILITIES, PROBABILITIES, estimator="biased")


def test_one_sample_has_no_pair():
    for estimator in ("unbiased", "block"):
        assert np.isnan(estimate(PROBABILITIES[:1], TARGETS[:1], estimator=estimator))


def test_a_block_estimate_does_not_depend_on_memory_blocks(monkeypatch):
    from lightning_reg.metrics import squared_kernel

    wanted = estimate(PROBABILITIES, TARGETS)
    monkeypatch.setattr(squared_kernel, "_ROWS", 200)
    assert estimate(PROBABILITIES, TARGETS) == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize(
    "arguments",
    [{"estimator": "linear"}, {"kernel": "laplace"}, {"bandwidth": 0}, {"block_size": 1}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        SquaredKernelCalibrationError(from_logits=True, **arguments)
