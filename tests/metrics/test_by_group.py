"""Metrics by group against each group alone."""

import math

import pytest
import torch
from torchmetrics import MeanMetric

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    AURC,
    ByGroup,
    CalibrationError,
    ExpectedAccuracy,
    KuiperCalibrationError,
    NegativeLogLikelihood,
    PredictiveEntropy,
    SquaredKernelCalibrationError,
    by_group,
)

_generator = torch.Generator().manual_seed(0)
LOGITS = torch.randn(90, 4, generator=_generator, dtype=torch.float64)
TARGETS = torch.randint(0, 4, (90,), generator=_generator)
GROUPS = torch.randint(0, 3, (90,), generator=_generator)


@pytest.mark.parametrize(
    "metric",
    [
        CalibrationError(from_logits=True, norm="l2"),
        AURC(from_logits=True),
        AURC(from_logits=True, exact=True),
        NegativeLogLikelihood(from_logits=True),
        SquaredKernelCalibrationError(from_logits=True, estimator="unbiased"),
    ],
)
def test_each_group_has_the_value_that_it_has_alone(metric):
    grouped = ByGroup(metric, 4, names=["a", "b", "c", "none"])
    for rows in torch.arange(90).split(25):
        grouped.update(LOGITS[rows], TARGETS[rows], GROUPS[rows])
    found = grouped.compute()
    alone = {}
    for number, name in enumerate("abc"):
        metric.reset()
        metric.update(LOGITS[number == GROUPS], TARGETS[number == GROUPS])
        alone[name] = float(metric.compute())
        assert float(found[name]) == pytest.approx(alone[name], abs=1e-12)
    assert math.isnan(found["none"])
    assert float(found["worst"]) == pytest.approx(max(alone.values()))
    assert float(found["gap"]) == pytest.approx(max(alone.values()) - min(alone.values()))


def test_the_worst_is_the_smallest_where_higher_is_better():
    found = by_group(
        torch.eye(3),
        torch.tensor([0, 1, 0]),
        torch.tensor([0, 1, 1]),
        metric=ExpectedAccuracy(from_logits=True),
        num_groups=2,
    )
    assert {k: float(v) for k, v in found.items()} == {
        "group_0": 1.0,
        "group_1": 0.5,
        "worst": 0.5,
        "gap": 0.5,
    }


def test_without_a_direction_there_is_a_gap_and_no_worst():
    metric = ByGroup(PredictiveEntropy(from_logits=True), 3)
    metric.update(LOGITS, GROUPS)
    assert set(metric.compute()) == {"group_0", "group_1", "group_2", "gap"}


def test_groups_of_positions_and_of_whole_samples():
    dense = LOGITS[:60].view(5, 3, 4, 4).permute(0, 3, 1, 2)
    target, group = TARGETS[:60].view(5, 3, 4), GROUPS[:60].view(5, 3, 4)
    metric = CalibrationError(from_logits=True)
    found = by_group(dense, target, group, metric=metric, num_groups=3)
    wanted = by_group(LOGITS[:60], TARGETS[:60], GROUPS[:60], metric=metric, num_groups=3)
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(float(value), abs=1e-12)
    domain = torch.tensor([0, 2, 2, 1, 0])
    found = by_group(dense, target, domain, metric=metric, num_groups=3)
    rows = domain.repeat_interleave(12)
    wanted = by_group(LOGITS[:60], TARGETS[:60], rows, metric=metric, num_groups=3)
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(float(value), abs=1e-12)


def test_the_metric_that_was_given_is_left_alone():
    metric = CalibrationError(from_logits=True)
    metric.update(LOGITS, TARGETS)
    before = float(metric.compute())
    grouped = ByGroup(metric, 3)
    assert math.isnan(grouped.compute()["gap"])
    grouped.update(LOGITS, TARGETS, GROUPS)
    assert float(metric.compute()) == before


def test_a_batch_that_one_group_refuses_counts_for_none():
    metric = ByGroup(AURC(from_logits=True, exact=True), 2)
    metric.update(LOGITS[:4], TARGETS[:4], torch.tensor([0, 0, 1, 1]))
    before = {k: float(v) for k, v in metric.compute().items()}
    with pytest.raises(ArgumentError, match="outside their range"):
        metric.update(LOGITS[:4], torch.tensor([0, 1, 2, 9]), torch.tensor([0, 0, 1, 1]))
    assert {k: float(v) for k, v in metric.compute().items()} == before


def grouped_on_rank(kept):
    """Rank 0 holds two of the groups, rank 1 the others and none of theirs."""
    mine = (GROUPS < 2) if torch.distributed.get_rank() == 0 else (GROUPS >= 2)
    metric = ByGroup(KuiperCalibrationError(from_logits=True, exact=kept), 4)
    metric.update(LOGITS[mine], TARGETS[mine], GROUPS[mine])
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("kept", [False, True])
def test_ranks_may_hold_different_groups(ranks, kept):
    whole = ByGroup(KuiperCalibrationError(from_logits=True, exact=kept), 4)
    whole.update(LOGITS, TARGETS, GROUPS)
    expected = {name: float(value) for name, value in whole.compute().items()}
    for found in ranks.run(grouped_on_rank, kept):
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_groups_are_drawn_as_bars():
    metric = ByGroup(ExpectedAccuracy(from_logits=True), 2, names=["day", "night"])
    metric.update(torch.eye(2), torch.tensor([0, 0]), torch.tensor([0, 1]))
    _, axes = metric.plot()
    assert [bar.get_width() for bar in axes.patches] == [1.0, 0.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["day", "night"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MeanMetric(), 2), "metric of this package"),
        ((CalibrationError(from_logits=True), 0), "num_groups"),
        ((CalibrationError(from_logits=True), 2, ["a"]), "different names"),
        ((CalibrationError(from_logits=True), 2, ["a", "a"]), "different names"),
        ((CalibrationError(from_logits=True), 2, ["a", "worst"]), "different names"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    metric, num_groups, *names = arguments
    with pytest.raises(ArgumentError, match=message):
        ByGroup(metric, num_groups, names=names[0] if names else None)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (GROUPS.float(), "float32"),
        (GROUPS - 1, "-1 to 1"),
        (GROUPS + 1, "1 to 3"),
        (GROUPS[:4], "do not fit"),
    ],
)
def test_bad_groups_are_refused(group, message):
    metric = ByGroup(CalibrationError(from_logits=True), 3)
    with pytest.raises(ArgumentError, match=message):
        metric.update(LOGITS, TARGETS, group)
