"""Every reading of the bins against NumPy, against other libraries, and against each other."""

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    AverageCalibrationError,
    BrierDecomposition,
    BrierScore,
    CalibrationError,
    CalibrationSuite,
    ExpectedAccuracy,
    NegativeLogLikelihood,
    OverconfidenceError,
    UnderconfidenceError,
    average_calibration_error,
    brier_decomposition,
    brier_score,
    calibration_error,
    calibration_suite,
    overconfidence_error,
    underconfidence_error,
)
from lightning_reg.metrics.binning import Grid
from lightning_reg.metrics.inputs import top_class

_rng = np.random.default_rng(0)
LOGITS = _rng.normal(size=(500, 5)) * 2
P = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
# More often right than an unsure prediction says: bins err on both sides.
_truth = np.where(P.max(1, keepdims=True) > 0.6, P, 0.3 * P + 0.7 * np.eye(5)[P.argmax(1)])
TARGETS = (_truth.cumsum(1) < _rng.random((500, 1))).sum(1)
CONFIDENCE, CORRECT = P.max(1), (P.argmax(1) == TARGETS).astype(float)
SOFT = np.random.default_rng(1).dirichlet(np.ones(5), 500)
LABELS = np.random.default_rng(2).integers(0, 2, (500, 5))

X, Y = torch.tensor(LOGITS), torch.tensor(TARGETS)


def bins_of(confidence, correct, n_bins=15):
    """(share, mean confidence, mean correctness, members) of each bin that holds something."""
    index = np.minimum(np.floor(confidence * n_bins), n_bins - 1)
    for b in range(n_bins):
        inside = index == b
        if inside.any():
            yield inside.mean(), confidence[inside].mean(), correct[inside].mean(), inside


def ece(confidence, correct, n_bins=15, power=1):
    total = sum(s * abs(c - a) ** power for s, c, a, _ in bins_of(confidence, correct, n_bins))
    return total ** (1 / power)


def per_class(targets, **kwargs):
    return np.array([ece(P[:, k], targets[:, k], **kwargs) for k in range(5)])


ONE_HOT = np.eye(5)[TARGETS]


# ---------------------------------------------------------------------- bins


@pytest.mark.parametrize("sizes", [(1,), (3,), (10,), (15,), (49, 50), tuple(range(5, 51))])
def test_cells_are_cut_exactly_at_the_edges(sizes):
    grid = Grid(sizes)
    edges = np.array(sorted({b / n for n in sizes for b in range(1, n)} | {0.0}))
    around = np.concatenate(
        [edges, np.nextafter(edges, 2), np.nextafter(edges, -1), _rng.random(2000), [1.0]]
    )
    around = around[(around >= 0) & (around <= 1)]
    expected = np.searchsorted(edges, around, side="right") - 1
    assert grid.place(torch.tensor(around)).tolist() == expected.tolist()


def test_a_sweep_is_the_same_as_each_number_of_bins_alone():
    numbers = tuple(range(5, 51))
    suite = CalibrationSuite(from_logits=True, sweep=numbers)
    suite.update(X, Y)
    values = suite.compute()
    for n in numbers:
        for name, norm in (("ece", "l1"), ("rmsce", "l2"), ("mce", "max")):
            alone = calibration_error(X, Y, from_logits=True, n_bins=n, norm=norm)
            assert float(values[f"{name}_{n}"]) == pytest.approx(float(alone), abs=1e-12)
    assert suite.counts.shape == (len({b / n for n in (15, *numbers) for b in range(n)}),)


@pytest.mark.parametrize("values", [40, 40_000])
@pytest.mark.parametrize("classes", [10, 256, 300, 1000])
def test_the_top_class_is_the_first_of_equals(classes, values):
    generator = torch.Generator().manual_seed(classes)
    scores = torch.randint(0, values, (300, classes), generator=generator).float()
    assert torch.equal(top_class(scores), torch.tensor(scores.numpy().argmax(1)))


# ---------------------------------------------------------------------- views


@pytest.mark.parametrize("power", [1, 2])
def test_classwise_is_the_mean_over_classes(power):
    kwargs = {"from_logits": True, "view": "classwise", "norm": f"l{power}"}
    each = calibration_error(X, Y, average="none", **kwargs)
    np.testing.assert_allclose(each, per_class(ONE_HOT, power=power), atol=1e-12)
    value = calibration_error(X, Y, **kwargs)
    assert float(value) == pytest.approx(per_class(ONE_HOT, power=power).mean(), abs=1e-12)


def test_classwise_with_soft_targets():
    value = calibration_error(X, torch.tensor(SOFT), from_logits=True, view="classwise")
    assert float(value) == pytest.approx(per_class(SOFT).mean(), abs=1e-12)


def test_micro_counts_all_classes_together():
    value = calibration_error(X, Y, from_logits=True, view="classwise", average="micro")
    assert float(value) == pytest.approx(ece(P.ravel(), ONE_HOT.ravel()), abs=1e-12)


@pytest.mark.parametrize("threshold", [0.01, 0.2, 0.5])
def test_what_is_below_the_threshold_does_not_count(threshold):
    kwargs = {"from_logits": True, "threshold": threshold}
    kept = threshold <= CONFIDENCE
    value = calibration_error(X, Y, **kwargs)
    assert float(value) == pytest.approx(ece(CONFIDENCE[kept], CORRECT[kept]), abs=1e-12)
    each = [
        np.mean([abs(c - a) for _, c, a, _ in bins_of(P[k, i], ONE_HOT[k, i])])
        for i in range(5)
        for k in [P[:, i] >= threshold]
    ]
    value = average_calibration_error(X, Y, view="classwise", **kwargs)
    assert float(value) == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_top_k_judges_the_k_largest_together(k):
    order = np.argsort(-LOGITS, 1, kind="stable")[:, :k]
    confidence = np.minimum(np.take_along_axis(P, order, 1).sum(1), 1)
    hard = (order == TARGETS[:, None]).any(1).astype(float)
    soft = np.take_along_axis(SOFT, order, 1).sum(1)
    for target, correct in ((Y, hard), (torch.tensor(SOFT), soft)):
        value = calibration_error(X, target, from_logits=True, view="top_k", top_k=k)
        assert float(value) == pytest.approx(ece(confidence, correct), abs=1e-12)


def test_ties_at_the_kth_place_go_to_the_first_classes():
    even = torch.zeros(3, 4, dtype=torch.float64)
    metric = CalibrationError(from_logits=True, view="top_k", top_k=2)
    metric.update(even, torch.tensor([0, 1, 2]))
    assert float(metric.correct_sum.sum()) == 2


def test_binary_by_the_likelier_class_is_the_multiclass_definition():
    chances = torch.tensor(P[:, 0])
    target = torch.tensor((TARGETS == 0).astype(int))
    value = calibration_error(
        chances, target, from_logits=False, task="binary", view="top_label", n_bins=10
    )
    pairs = torch.stack([1 - chances, chances], 1)
    both = calibration_error(pairs, target, from_logits=False, n_bins=10)
    assert float(value) == pytest.approx(float(both), abs=1e-12)
    positive = calibration_error(chances, target, from_logits=False, task="binary", n_bins=10)
    assert abs(float(value) - float(positive)) > 0.01


def test_multilabel_is_one_binary_task_for_each_label():
    labels, sigmoid = torch.tensor(LABELS), 1 / (1 + np.exp(-LOGITS))
    expected = [ece(sigmoid[:, k], LABELS[:, k]) for k in range(5)]
    kwargs = {"from_logits": True, "task": "multilabel"}
    each = calibration_error(X, labels, average="none", **kwargs)
    np.testing.assert_allclose(each, expected, atol=1e-12)
    ignored = labels.clone()
    ignored[::3, 1] = -7
    expected[1] = ece(*(v[np.arange(500) % 3 != 0, 1] for v in (sigmoid, LABELS)))
    each = calibration_error(X, ignored, average="none", ignore_index=-7, **kwargs)
    np.testing.assert_allclose(each, expected, atol=1e-12)


def test_dense_predictions_are_read_alike_in_any_layout():
    images = torch.randn(2, 3, 700, 700, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 3, (2, 700, 700), generator=torch.Generator().manual_seed(1))
    rows = images.permute(0, 2, 3, 1).reshape(-1, 3)
    for view in ("top_label", "classwise"):
        flat = calibration_error(rows, target.flatten(), from_logits=True, view=view)
        for layout in (images, images.contiguous(memory_format=torch.channels_last)):
            value = calibration_error(layout, target, from_logits=True, view=view)
            assert float(value) == pytest.approx(float(flat), abs=1e-12)


# ---------------------------------------------------------------------- readings


def test_debiased_error_takes_away_what_chance_adds():
    squares = 0.0
    for share, c, a, inside in bins_of(CONFIDENCE, CORRECT):
        n = inside.sum()
        squares += share * ((c - a) ** 2 - a * (1 - a) / (n - 1) if n > 1 else 0)
    value = calibration_error(X, Y, from_logits=True, norm="l2", debiased=True)
    assert float(value) == pytest.approx(np.sqrt(squares), abs=1e-12)


def test_debiased_error_of_a_calibrated_model_is_near_zero():
    rng = np.random.default_rng(3)
    plain, debiased = [], []
    for _ in range(200):
        p = rng.random(200)
        y = torch.tensor((rng.random(200) < p).astype(int))
        kwargs = {"from_logits": False, "task": "binary", "norm": "l2"}
        plain.append(float(calibration_error(torch.tensor(p), y, **kwargs)) ** 2)
        metric = CalibrationError(debiased=True, **kwargs)
        metric.update(torch.tensor(p), y)
        from lightning_reg.metrics.readings import debiased_square_error

        debiased.append(float(debiased_square_error(metric.moments())))
    assert np.mean(plain) > 0.008
    # The mean of 200 has a standard error of 0.0003.
    assert abs(np.mean(debiased)) < 0.001


def test_over_and_underconfidence_add_up_to_the_error():
    over = overconfidence_error(X, Y, from_logits=True)
    under = underconfidence_error(X, Y, from_logits=True)
    assert float(over + under) == pytest.approx(ece(CONFIDENCE, CORRECT), abs=1e-12)
    expected = sum(s * max(c - a, 0) for s, c, a, _ in bins_of(CONFIDENCE, CORRECT))
    assert float(over) == pytest.approx(expected, abs=1e-12)
    expected = sum(s * c * max(c - a, 0) for s, c, a, _ in bins_of(CONFIDENCE, CORRECT))
    over = overconfidence_error(X, Y, from_logits=True, weighted=True)
    assert float(over) == pytest.approx(expected, abs=1e-12)
    assert min(float(over), float(under)) > 0.001


def test_brier_score_is_the_squared_distance():
    assert float(brier_score(X, Y, from_logits=True)) == pytest.approx(
        ((P - ONE_HOT) ** 2).sum(1).mean(), abs=1e-12
    )
    soft = brier_score(X, torch.tensor(SOFT), from_logits=True)
    assert float(soft) == pytest.approx(((P - SOFT) ** 2).sum(1).mean(), abs=1e-12)
    binary = brier_score(
        torch.tensor(P[:, 0]), torch.tensor(TARGETS == 0), from_logits=False, task="binary"
    )
    assert float(binary) == pytest.approx(brier_score_loss(TARGETS == 0, P[:, 0]), abs=1e-12)


def test_the_parts_of_the_brier_score_are_those_of_the_definition():
    parts = {k: float(v) for k, v in brier_decomposition(X, Y, from_logits=True).items()}
    rows = list(bins_of(CONFIDENCE, CORRECT))
    mean = CORRECT.mean()
    expected = {
        "brier": ((CONFIDENCE - CORRECT) ** 2).mean(),
        "reliability": sum(s * (c - a) ** 2 for s, c, a, _ in rows),
        "resolution": sum(s * (a - mean) ** 2 for s, _, a, _ in rows),
        "uncertainty": mean * (1 - mean),
        "within_bin_variance": sum(s * CONFIDENCE[i].var() for s, _, _, i in rows),
        "within_bin_covariance": sum(
            2 * s * ((CONFIDENCE[i] - c) * (CORRECT[i] - a)).mean() for s, c, a, i in rows
        ),
    }
    assert parts == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("target", [Y, torch.tensor(SOFT)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"view": "classwise"}, {"view": "classwise", "average": "micro"}, {"n_bins": 1}],
)
def test_the_parts_add_up_to_the_brier_score(settings, target):
    parts = brier_decomposition(X, target, from_logits=True, **settings)
    added = (
        parts["reliability"]
        - parts["resolution"]
        + parts["uncertainty"]
        + parts["within_bin_variance"]
        - parts["within_bin_covariance"]
    )
    assert float(added) == pytest.approx(float(parts["brier"]), abs=1e-12)
    if settings == {"view": "classwise"}:
        score = brier_score(X, target, from_logits=True)
        assert float(parts["brier"]) == pytest.approx(float(score), abs=1e-12)


def test_multilabel_parts_are_means_over_labels():
    parts = brier_decomposition(X, torch.tensor(LABELS), from_logits=True, task="multilabel")
    expected = ((1 / (1 + np.exp(-LOGITS)) - LABELS) ** 2).mean()
    assert float(parts["brier"]) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------- the suite


def test_the_suite_agrees_with_each_metric_alone():
    kwargs = {"from_logits": True}
    parts = brier_decomposition(X, Y, **kwargs)
    del parts["brier"]
    alone = {
        "ece": calibration_error(X, Y, **kwargs),
        "rmsce": calibration_error(X, Y, norm="l2", **kwargs),
        "mce": calibration_error(X, Y, norm="max", **kwargs),
        "debiased_rmsce": calibration_error(X, Y, norm="l2", debiased=True, **kwargs),
        "ace": average_calibration_error(X, Y, **kwargs),
        "overconfidence": overconfidence_error(X, Y, **kwargs),
        "underconfidence": underconfidence_error(X, Y, **kwargs),
        "confidence_gap": CONFIDENCE.mean() - CORRECT.mean(),
        "accuracy": CORRECT.mean(),
        "nll": -np.log(P[np.arange(500), TARGETS]).mean(),
        "brier": brier_score(X, Y, **kwargs),
        "classwise_ece": calibration_error(X, Y, view="classwise", **kwargs),
        "classwise_rmsce": calibration_error(X, Y, view="classwise", norm="l2", **kwargs),
        "classwise_mce": calibration_error(X, Y, view="classwise", norm="max", **kwargs),
        **parts,
    }
    values = calibration_suite(X, Y, num_classes=5, sweep=(), **kwargs)
    assert {k: float(v) for k, v in values.items()} == pytest.approx(
        {k: float(v) for k, v in alone.items()}, abs=1e-12
    )


def test_the_suite_of_a_binary_task():
    chances, target = torch.tensor(P[:, 0]), torch.tensor(TARGETS == 0)
    values = calibration_suite(chances, target, from_logits=False, task="binary")
    y = (TARGETS == 0).astype(float)
    expected = {
        "ece": ece(P[:, 0], y),
        "accuracy": ((P[:, 0] >= 0.5) == y).mean(),
        "nll": -np.log(np.where(y > 0, P[:, 0], 1 - P[:, 0])).mean(),
        "brier": ((P[:, 0] - y) ** 2).mean(),
    }
    assert {k: float(values[k]) for k in expected} == pytest.approx(expected, abs=1e-12)


def test_saturated_logits_have_a_finite_likelihood():
    values = calibration_suite(
        torch.tensor([[2000.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1]), from_logits=True
    )
    assert float(values["nll"]) == pytest.approx((2000 + np.log1p(np.exp(-1))) / 2)


def test_the_suite_reads_its_logits_once(monkeypatch):
    calls = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda *a, **k: calls.append("s") or softmax(*a, **k))
    monkeypatch.setattr(torch, "log_softmax", lambda *a, **k: calls.append("l"))
    calibration_suite(X, Y, from_logits=True, num_classes=5)
    assert calls == ["s"]


def test_readings_of_the_same_bins_share_one_update():
    kwargs = {"from_logits": True}
    collection = MetricCollection(
        {
            "ece": CalibrationError(**kwargs),
            "mce": CalibrationError(norm="max", **kwargs),
            "debiased": CalibrationError(norm="l2", debiased=True, **kwargs),
            "ace": AverageCalibrationError(**kwargs),
            "over": OverconfidenceError(**kwargs),
            "under": UnderconfidenceError(weighted=True, **kwargs),
            "parts": BrierDecomposition(**kwargs),
            "other": CalibrationError(n_bins=10, **kwargs),
            "nll": NegativeLogLikelihood(**kwargs),
        }
    )
    for part in range(0, 500, 100):
        collection.update(X[part : part + 100], Y[part : part + 100])
    groups = {frozenset(names) for names in collection.compute_groups.values()}
    shared = frozenset({"ece", "mce", "debiased", "ace", "over", "under", "parts"})
    assert groups == {shared, frozenset({"other"}), frozenset({"nll"})}
    values = collection.compute()
    assert float(values["mce"]) == pytest.approx(
        float(calibration_error(X, Y, norm="max", **kwargs)), abs=1e-12
    )
    assert float(values["nll"]) == pytest.approx(
        -np.log(P[np.arange(500), TARGETS]).mean(), abs=1e-12
    )


# ---------------------------------------------------------------------- other libraries

# Values of float64 softmax of LOGITS against TARGETS, 15 bins, computed with netcal 1.4.0,
# uncertainty-calibration 0.1.4 and torch-uncertainty 0.13.0 (float32 inside).
NETCAL = {"ece": 0.2268155299863238, "mce": 0.7766968081880521, "ace": 0.2915670213217099}
UNCERTAINTY_CALIBRATION = {"rmsce": 0.29765381619543985, "debiased_rmsce": 0.29135008152702635}
TORCH_UNCERTAINTY = {
    "l1": [0.053549853, 0.069651907, 0.068672167, 0.048274066, 0.075075683],
    "l2": [0.088036571, 0.115446921, 0.132599665, 0.088623118, 0.142391798],
    "max": [0.323397526, 0.368288874, 0.425288194, 0.449030359, 0.438120343],
}
TORCH_UNCERTAINTY_BRIER = {"brier": 0.38302553, "top": 0.20654973}


def test_equals_other_libraries_where_they_compute_the_same():
    values = {k: float(v) for k, v in calibration_suite(X, Y, from_logits=True).items()}
    for name, value in (NETCAL | UNCERTAINTY_CALIBRATION).items():
        assert values[name] == pytest.approx(value, abs=1e-9), name
    assert values["brier"] == pytest.approx(TORCH_UNCERTAINTY_BRIER["brier"], abs=1e-6)
    top = float(brier_decomposition(X, Y, from_logits=True)["brier"])
    assert top == pytest.approx(TORCH_UNCERTAINTY_BRIER["top"], abs=1e-6)
    for norm, value in TORCH_UNCERTAINTY.items():
        each = calibration_error(
            X, Y, from_logits=True, view="classwise", average="none", norm=norm
        )
        assert each.tolist() == pytest.approx(value, abs=1e-7)
    for norm, name in (("l1", "ece"), ("l2", "rmsce"), ("max", "mce")):
        reference = multiclass_calibration_error(torch.tensor(P), Y, 5, 15, norm)
        assert values[name] == pytest.approx(float(reference), abs=1e-6)


def test_equals_netcal_if_it_is_installed():
    netcal = pytest.importorskip("netcal.metrics")
    value = calibration_error(X, Y, from_logits=True)
    assert float(value) == pytest.approx(netcal.ECE(15).measure(P, TARGETS), abs=1e-9)


def test_torchmetrics_gives_confidence_one_a_bin_of_its_own():
    # What the docstring says: if this fails, torchmetrics has mended it.
    chances = torch.tensor([[0.95, 0.05], [1.0, 0.0]])
    theirs = multiclass_calibration_error(chances, torch.tensor([0, 1]), 2, 15)
    assert float(theirs) == pytest.approx(0.525, abs=1e-6)


# ---------------------------------------------------------------------- defects of others


def test_thirty_million_samples_of_one_bin():
    metric = CalibrationError(from_logits=False, task="binary")
    chances = torch.tensor([0.5]).expand(3_750_000)
    target = torch.tensor([1, 0, 0, 0]).expand(937_500, 4).reshape(-1)
    for _ in range(8):
        metric.update(chances, target)
    assert int(metric.counts.sum()) == 30_000_000
    assert float(metric.compute()) == pytest.approx(0.25, abs=1e-12)


def test_a_batch_whose_logits_look_like_probabilities_is_still_logits():
    logits = torch.rand(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[200:] *= 8
    target = torch.randint(0, 3, (400,), generator=torch.Generator().manual_seed(1))
    whole = calibration_error(logits, target, from_logits=True)
    metric = CalibrationError(from_logits=True)
    for part in range(0, 400, 10):
        metric.update(logits[part : part + 10], target[part : part + 10])
    assert float(metric.compute()) == pytest.approx(float(whole), abs=1e-14)


def test_one_class_is_refused_and_one_occurring_class_is_not():
    with pytest.raises(ArgumentError, match="two classes"):
        calibration_error(torch.ones(4, 1), torch.zeros(4).long(), from_logits=False)
    value = calibration_error(X[:, :2], torch.zeros(500).long(), from_logits=True)
    assert 0 < float(value) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"view": "positive"}, "top_label, top_k, classwise"),
        ({"view": "classwise"}, "num_classes=10"),
        ({"view": "top_k", "top_k": 0}, "top_k=5"),
        ({"average": "weighted"}, "macro, micro, none"),
        ({"threshold": 1.5}, "threshold=0.001"),
        ({"debiased": True}, 'norm="l2"'),
        ({"sweep": (0,)}, "n_bins=15"),
        ({"task": "multilabel"}, "num_classes=10"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        CalibrationError(**{"from_logits": True, **arguments})


def test_the_suite_refuses_what_it_cannot_judge():
    with pytest.raises(ArgumentError, match="num_classes=10"):
        CalibrationSuite(from_logits=True, view="classwise")
    with pytest.raises(ArgumentError, match="binary, multiclass"):
        CalibrationSuite(from_logits=True, task="multilabel")
    metric = CalibrationSuite(from_logits=True, num_classes=4)
    with pytest.raises(ArgumentError, match="num_classes=5"):
        metric.update(X, Y)
    for kind in (BrierScore, ExpectedAccuracy, NegativeLogLikelihood):
        with pytest.raises(ArgumentError, match="binary, multiclass"):
            kind(from_logits=True, task="multilabel")
