"""Marginal, per-class and conditional entropies against SciPy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import mutual_info_score, roc_auc_score
from torchmetrics import MetricCollection

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    ClassEntropy,
    ConditionalEntropy,
    EntropySeparation,
    LabelInformation,
    MarginalEntropy,
    PredictiveEntropy,
    class_entropy,
    conditional_entropy,
    entropy_separation,
    label_information,
    marginal_entropy,
)

_rng = np.random.default_rng(0)
N, C = 400, 5
LOGITS = _rng.normal(size=(N, C)) * 2
TARGETS = np.where(_rng.random(N) < 0.6, LOGITS.argmax(1), _rng.integers(0, C, N))
P = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
GIVEN = (torch.tensor(LOGITS), torch.tensor(TARGETS))
ARGS = {"num_classes": C, "from_logits": True}


def test_marginal_entropy_is_that_of_the_mean_prediction():
    value = marginal_entropy(GIVEN[0], **ARGS)
    assert float(value) == pytest.approx(scipy_entropy(P.mean(0)), abs=1e-12)
    normalized = marginal_entropy(GIVEN[0], normalized=True, **ARGS)
    assert float(normalized) == pytest.approx(scipy_entropy(P.mean(0)) / math.log(C), abs=1e-12)


def marginal_on_rank():
    metric = MarginalEntropy(**ARGS)
    rank = torch.distributed.get_rank()
    # Each rank sees other classes, so that the mean of its entropies is far from the joint one.
    order = GIVEN[0][torch.tensor(np.argsort(LOGITS.argmax(1), kind="stable"))]
    metric.update(order.split([300, 100])[rank])
    return float(metric.compute())


def test_ranks_join_their_sums_and_not_their_entropies(ranks):
    expected = scipy_entropy(P.mean(0))
    assert ranks.run(marginal_on_rank) == pytest.approx([expected, expected], abs=1e-12)


@pytest.mark.parametrize("by", ["target", "prediction"])
def test_class_entropy_is_the_mean_within_each_class(by):
    labels = TARGETS if by == "target" else LOGITS.argmax(1)
    expected = [scipy_entropy(P[labels == c], axis=1).mean() for c in range(C)]
    value = class_entropy(*GIVEN, by=by, **ARGS)
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-12)


def test_a_class_without_samples_has_no_entropy():
    value = class_entropy(GIVEN[0][:1], torch.tensor([2]), **ARGS)
    assert value.isnan().tolist() == [True, True, False, True, True]


def test_conditional_entropies_are_those_of_the_contingency_table():
    table = np.zeros((C, C))
    np.add.at(table, (TARGETS, LOGITS.argmax(1)), 1 / N)
    columns, rows = table.sum(0), table.sum(1)
    given_prediction = sum(columns[k] * scipy_entropy(table[:, k]) for k in range(C))
    given_target = sum(rows[y] * scipy_entropy(table[y]) for y in range(C))
    one = conditional_entropy(*GIVEN, **ARGS)
    other = conditional_entropy(*GIVEN, given="target", **ARGS)
    assert float(one) == pytest.approx(given_prediction, abs=1e-12)
    assert float(other) == pytest.approx(given_target, abs=1e-12)


def test_label_information_equals_scikit_learn():
    expected = mutual_info_score(TARGETS, LOGITS.argmax(1))
    assert float(label_information(*GIVEN, **ARGS)) == pytest.approx(expected, abs=1e-12)


def test_a_drawn_class_uses_the_whole_prediction():
    joint = sum(np.outer(np.eye(C)[y], p) for y, p in zip(TARGETS, P, strict=True)) / N
    expected = (
        scipy_entropy(joint.sum(0)) + scipy_entropy(joint.sum(1)) - scipy_entropy(joint.ravel())
    )
    value = label_information(*GIVEN, drawn=True, **ARGS)
    assert float(value) == pytest.approx(expected, abs=1e-12)
    hard = label_information(*GIVEN, **ARGS)
    assert float(value) < float(hard)  # drawing loses information


def test_soft_targets_that_are_certain_equal_labels():
    soft = torch.nn.functional.one_hot(GIVEN[1], C).double()
    one, other = (label_information(GIVEN[0], t, drawn=True, **ARGS) for t in (GIVEN[1], soft))
    assert float(one) == pytest.approx(float(other), abs=1e-12)


def test_information_and_what_stays_unknown_add_up_to_the_labels_entropy():
    metrics = MetricCollection([ConditionalEntropy(**ARGS), LabelInformation(**ARGS)])
    metrics.update(*GIVEN)
    assert len(metrics.compute_groups) == 1
    total = sum(float(v) for v in metrics.compute().values())
    assert total == pytest.approx(scipy_entropy(np.bincount(TARGETS)), abs=1e-12)


def test_a_table_of_other_meaning_is_not_shared():
    metrics = MetricCollection([ConditionalEntropy(**ARGS), LabelInformation(drawn=True, **ARGS)])
    metrics.update(*GIVEN)
    assert len(metrics.compute_groups) == 2


def test_predictions_less_marginal_is_input_information():
    metrics = [MarginalEntropy(**ARGS), PredictiveEntropy(from_logits=True)]
    for metric in metrics:
        metric.update(GIVEN[0])
    information = float(metrics[0].compute() - metrics[1].compute())
    expected = np.mean([(p * np.log(p / P.mean(0))).sum() for p in P])
    assert information == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (MarginalEntropy, {"num_classes": 1}, "num_classes"),
        (ClassEntropy, {"by": "row"}, "target, prediction"),
        (ConditionalEntropy, {"given": "both"}, "target, prediction"),
        (LabelInformation, {"task": "binary"}, "stack"),
        (LabelInformation, {"class_dim": 1.5}, "class_dim"),
        (EntropySeparation, {"n_bins": 1, "num_classes": None}, "n_bins"),
    ],
)
def test_bad_arguments_are_refused(kind, arguments, message):
    given = {k: v for k, v in {**ARGS, **arguments}.items() if v is not None}
    with pytest.raises(ArgumentError, match=message):
        kind(**given)


def test_predictions_of_another_width_are_refused():
    with pytest.raises(ArgumentError, match="num_classes=5"):
        marginal_entropy(GIVEN[0], num_classes=4, from_logits=True)


# ---------------------------------------------------------------- right and wrong


def test_separation_is_the_area_under_the_curve_within_its_bound():
    entropies = scipy_entropy(P, axis=1)
    wrong = LOGITS.argmax(1) != TARGETS
    exact = roc_auc_score(wrong, entropies)
    metric = EntropySeparation(from_logits=True, n_bins=50)
    metric.update(*GIVEN)
    assert abs(float(metric.compute()) - exact) <= float(metric.bound()) < 0.02
    fine = entropy_separation(*GIVEN, from_logits=True, n_bins=10**6)
    assert float(fine) == pytest.approx(exact, abs=1e-9)
    # The same binned, as ties.
    binned = roc_auc_score(wrong, np.floor(entropies / math.log(C) * 50))
    assert float(metric.compute()) == pytest.approx(binned, abs=1e-12)


def test_histograms_are_numpy_s():
    metric = EntropySeparation(from_logits=True, n_bins=20)
    metric.update(*GIVEN)
    share = scipy_entropy(P, axis=1) / math.log(C)
    right = LOGITS.argmax(1) == TARGETS
    for counts, chosen in zip(metric.histogram(), (right, ~right), strict=True):
        assert counts.tolist() == np.histogram(share[chosen], 20, (0, 1))[0].tolist()


def test_uniform_predictions_belong_to_the_last_bin_and_certain_ones_to_the_first():
    metric = EntropySeparation(from_logits=False, n_bins=10)
    metric.update(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]]), torch.tensor([0, 0]))
    assert metric.histogram().right.tolist() == [1, *[0] * 8, 1]


def test_without_errors_there_is_nothing_to_separate():
    value = entropy_separation(torch.eye(2), torch.tensor([0, 1]), from_logits=False)
    assert math.isnan(float(value))


def test_the_figure_shows_both_distributions_with_area_one():
    metric = EntropySeparation(from_logits=True, n_bins=90)
    metric.update(*GIVEN)
    _, axes = metric.plot()
    for bars in axes.containers:
        assert sum(b.get_height() * b.get_width() for b in bars) == pytest.approx(1)
    # 90 bins in bars of 3.
    expected = metric.histogram().right.view(30, 3).sum(1)[0] / metric.right.sum() * 30
    assert axes.containers[0][0].get_height() == pytest.approx(float(expected))
