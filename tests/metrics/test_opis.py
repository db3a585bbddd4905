"""The operating-point inconsistency against all pairs in NumPy and closed forms."""

import itertools

import numpy as np
import pytest
import torch

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import OperatingPointInconsistency, operating_point_inconsistency

_rng = np.random.default_rng(0)
CENTRES = _rng.normal(size=(4, 6))
TARGETS = np.arange(60) % 4
# Classes of different spread: no threshold suits all.
SPREAD = np.array([0.1, 0.3, 0.8, 1.5])
EMBEDDINGS = CENTRES[TARGETS] + SPREAD[TARGETS, None] * _rng.normal(size=(60, 6))


def by_pairs(embeddings, targets, far=(0.01, 0.1), resolution=2048):
    """From the definition, pair by pair, threshold by threshold."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    within = {c: [] for c in np.unique(targets)}
    across = {c: [] for c in np.unique(targets)}
    pooled = []
    for i, j in itertools.combinations(range(len(unit)), 2):
        distance = np.linalg.norm(unit[i] - unit[j])
        if targets[i] == targets[j]:
            within[targets[i]].append(distance)
        else:
            pooled.append(distance)
            across[targets[i]].append(distance)
            across[targets[j]].append(distance)
    edges = np.linspace(0, 2, resolution + 1)
    rate = np.array([np.mean(np.array(pooled) <= d) for d in edges])
    edges = edges[(rate >= far[0]) & (rate <= far[1])]
    utility = []
    for c in within:
        if within[c]:
            phi = np.array([np.mean(np.array(within[c]) <= d) for d in edges])
            psi = np.array([np.mean(np.array(across[c]) > d) for d in edges])
            utility.append(2 * phi * psi / (phi + psi))
    squares = ((utility - np.mean(utility, 0)) ** 2).mean(0)
    return np.trapezoid(squares, edges) / (edges[-1] - edges[0])


def score(embeddings, targets, **arguments):
    value = operating_point_inconsistency(
        torch.tensor(embeddings), torch.tensor(targets), **arguments
    )
    return float(value)


@pytest.mark.parametrize("far", [(0.01, 0.1), (0.2, 0.8)])
@pytest.mark.parametrize("resolution", [128, 2048])
def test_equals_all_pairs(far, resolution):
    found = score(EMBEDDINGS, TARGETS, far=far, resolution=resolution)
    assert found == pytest.approx(by_pairs(EMBEDDINGS, TARGETS, far, resolution), abs=1e-12)
    assert found > 0.001


def test_a_class_of_one_sample_takes_no_part():
    targets = TARGETS.copy()
    targets[7] = 9
    found = score(EMBEDDINGS, targets)
    assert found == pytest.approx(by_pairs(EMBEDDINGS, targets), abs=1e-12)


def test_classes_that_share_one_curve_have_none():
    """Four classes that a rotation carries into each other."""
    cloud = _rng.normal(size=(8, 2)) * 0.3 + [3.0, 0.5]
    turned = []
    for quarter in range(4):
        c, s = np.cos(np.pi / 2 * quarter), np.sin(np.pi / 2 * quarter)
        turned.append(cloud @ np.array([[c, s], [-s, c]]))
    found = score(np.concatenate(turned), np.repeat(np.arange(4), 8), far=(0.0, 0.9))
    assert found == pytest.approx(0, abs=1e-12)


def test_the_length_of_embeddings_does_not_count():
    scale = _rng.uniform(0.5, 20, size=(60, 1))
    assert score(EMBEDDINGS * scale, TARGETS) == pytest.approx(score(EMBEDDINGS, TARGETS))


def test_two_utilities_by_hand():
    """One class accepts all of its pairs, the other none, and neither accepts another class."""
    angle = np.array([0.0, 0.0, np.pi / 2, np.pi])
    embeddings = np.stack([np.cos(angle), np.sin(angle)], 1)
    # Class 0 is one point, class 1 is sqrt(2) wide and sqrt(2) or 2 away from class 0. At no
    # threshold below sqrt(2) is a pair across classes accepted: utilities 1 and 0.
    found = score(embeddings, np.array([0, 0, 1, 1]), far=(0.0, 0.1))
    assert found == pytest.approx(0.25, abs=1e-3)


def test_pairs_within_batches_are_counted_apart():
    metric = OperatingPointInconsistency(pairs="batch", num_classes=4, resolution=64)
    for part in (slice(0, 20), slice(20, 60)):
        metric.update(torch.tensor(EMBEDDINGS[part]), torch.tensor(TARGETS[part]))
    # 15 = 5 + 10 samples of each class.
    assert metric.positives.sum(1).tolist() == [10 + 45] * 4
    assert metric.negatives.sum(1).tolist() == [5 * 15 + 10 * 30] * 4


def test_memory_blocks_change_nothing(monkeypatch):
    from lightning_reg.metrics import opis

    wanted = score(EMBEDDINGS, TARGETS)
    monkeypatch.setattr(opis, "_BLOCK", 500)
    assert score(EMBEDDINGS, TARGETS) == wanted


def test_one_class_has_nothing_to_be_compared_with():
    assert np.isnan(score(EMBEDDINGS, np.zeros(60, dtype=np.int64)))


def test_utilities_are_drawn():
    metric = OperatingPointInconsistency(resolution=16)
    metric.update(torch.tensor(EMBEDDINGS), torch.tensor(TARGETS))
    _, axes = metric.plot()
    assert len(axes.lines) == 4 + 1
    mean = np.mean([line.get_ydata() for line in axes.lines[:4]], 0)
    np.testing.assert_allclose(axes.lines[4].get_ydata(), mean, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"far": (0.1, 0.01)}, "far"),
        ({"far": (0.1, 1.1)}, "far"),
        ({"pairs": "some"}, "pairs"),
        ({"pairs": "batch"}, "num_classes"),
        ({"resolution": 1}, "resolution"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        OperatingPointInconsistency(**arguments)
