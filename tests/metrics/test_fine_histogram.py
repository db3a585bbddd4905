"""The histogram of fine cells: its edges, its error, and what metrics share in it."""

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import (
    AUGRC,
    AURC,
    CoverageAtRisk,
    EqualMassCalibrationError,
    ExcessAURC,
    KolmogorovSmirnovCalibrationError,
    KuiperCalibrationError,
    MaximumMeanCalibrationError,
    RiskAtCoverage,
    SmoothCalibrationError,
    SweepCalibrationError,
)
from lightning_reg.metrics.fine_histogram import cell_of, fine_edges
from tests.metrics.order_data import CONFIDENCE, CORRECT, TIED, adversarial, filled

ADVERSARIAL = adversarial()
METRICS = {
    "aurc": (AURC, {}),
    "e-aurc": (ExcessAURC, {}),
    "augrc": (AUGRC, {}),
    "risk": (RiskAtCoverage, {"coverage": 0.7}),
    "coverage": (CoverageAtRisk, {"risk": 0.3}),
    "ks": (KolmogorovSmirnovCalibrationError, {}),
    "kuiper": (KuiperCalibrationError, {}),
    "kuiper test": (KuiperCalibrationError, {"normalized": True}),
    "mass l1": (EqualMassCalibrationError, {}),
    "mass l2": (EqualMassCalibrationError, {"norm": "l2"}),
    "mass max": (EqualMassCalibrationError, {"norm": "max"}),
    "mass debiased": (EqualMassCalibrationError, {"norm": "l2", "debiased": True}),
    "sweep": (SweepCalibrationError, {"max_bins": 64}),
    "smooth": (SmoothCalibrationError, {}),
    "smooth wide": (SmoothCalibrationError, {"bandwidth": 0.1}),
    "mmce": (MaximumMeanCalibrationError, {}),
}
LABELS_ONLY = {"e-aurc", "mass debiased"}


@pytest.mark.parametrize("resolution", [2, 7, 64, 2**15])
def test_edges_are_symmetric_and_equal_in_angle(resolution):
    edges = fine_edges(resolution).numpy()
    assert len(edges) == resolution + 1
    assert edges[0] == 0
    assert edges[-1] == 1
    np.testing.assert_allclose(edges, 1 - edges[::-1], atol=1e-15)
    angles = np.arcsin(np.sqrt(edges))
    np.testing.assert_allclose(np.diff(angles), np.pi / (2 * resolution), atol=3e-8)


@pytest.mark.parametrize("resolution", [2, 7, 2**15])
def test_cells_are_found_by_formula_as_by_search(resolution):
    edges = fine_edges(resolution)
    edges[0] = 1e-300
    up = torch.nextafter(edges, torch.ones_like(edges))
    down = torch.nextafter(edges, torch.zeros_like(edges))
    near_one = 1 - torch.logspace(-16, 0, 500, dtype=torch.float64)
    values = torch.cat([edges, up, down, near_one, torch.logspace(-320, 0, 500).double()])
    values = values.clamp(0, 1)
    assert torch.equal(cell_of(values, edges), torch.bucketize(values, edges, right=True))
    assert torch.equal(
        cell_of(values.float(), edges.float()),
        torch.bucketize(values.float(), edges.float(), right=True),
    )


def test_zero_and_one_have_cells_of_their_own():
    metric = filled(
        AURC(from_logits=False, task="binary", resolution=4),
        np.array([0.0, 5e-324, 1e-300, 0.3, 1 - 2**-53, 1.0]),
        np.zeros(6, dtype=np.int64),
    )
    # A score below 1/2 is judged as that of the other class: 0 is a confidence of 1.
    assert metric.counts.tolist() == [0, 0, 0, 1, 1, 4]
    score = KuiperCalibrationError(from_logits=False, task="binary", resolution=4)
    filled(score, np.array([0.0, 1e-300, 0.3, 1 - 2**-53, 1.0]), np.zeros(5, dtype=np.int64))
    assert score.counts.tolist() == [1, 1, 1, 0, 1, 1]


def test_a_probability_that_rounding_puts_above_one_is_one():
    metric = AURC(from_logits=False, resolution=4)
    metric.update(torch.tensor([[1.0005, 0.0]]), torch.tensor([0]))
    assert metric.counts.tolist() == [0, 0, 0, 0, 0, 1]
    assert float(metric.confidence_sum.sum()) == 1


@pytest.mark.parametrize("resolution", [8, 2**15])
@pytest.mark.parametrize("data", ADVERSARIAL)
@pytest.mark.parametrize("name", METRICS)
def test_the_error_is_within_the_stated_bound(name, data, resolution):
    if data == "soft" and name in LABELS_ONLY:
        return
    cls, arguments = METRICS[name]
    arguments = {"from_logits": False, "task": "binary", **arguments}
    exact = filled(cls(exact=True, **arguments), *ADVERSARIAL[data])
    rough = filled(cls(resolution=resolution, **arguments), *ADVERSARIAL[data])
    error, bound = abs(float(rough.value() - exact.value())), float(rough.error_bound())
    assert error <= bound + 1e-9
    assert float(exact.error_bound()) == 0


@pytest.mark.parametrize("name", METRICS)
def test_the_bound_shrinks_to_nothing_where_cells_separate_the_predictions(name):
    cls, arguments = METRICS[name]
    metric = cls(from_logits=False, task="binary", resolution=2**18, **arguments)
    assert float(filled(metric, CONFIDENCE, CORRECT).error_bound()) < 1e-4


def test_the_worst_case_of_one_cell_is_met():
    """The order within a cell that the bound allows for does occur."""
    confidence, correct = ADVERSARIAL["one cell, wrong before right"]
    arguments = {"from_logits": False, "task": "binary", "resolution": 8}
    for cls in (AURC, AUGRC, KolmogorovSmirnovCalibrationError):
        rough = filled(cls(**arguments), confidence, correct)
        exact = filled(cls(exact=True, from_logits=False, task="binary"), confidence, correct)
        error = abs(float(rough.value() - exact.value()))
        assert error > 0.05
        assert error == pytest.approx(float(rough.error_bound()), rel=1e-4)


def test_metrics_of_order_share_one_update():
    arguments = {"from_logits": False, "task": "multiclass"}
    collection = MetricCollection(
        {name: cls(**arguments, **own) for name, (cls, own) in METRICS.items()}
    )
    probabilities = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    target = torch.arange(50) % 3
    for _ in range(2):
        collection.update(probabilities, target)
    groups = [set(group) for group in collection.compute_groups.values()]
    # Those that take labels only refuse what the others accept.
    assert sorted(len(group) for group in groups) == [len(LABELS_ONLY), len(METRICS) - 2]
    for name, value in collection.compute().items():
        cls, own = METRICS[name]
        alone = cls(**arguments, **own)
        alone.update(probabilities.repeat(2, 1), target.repeat(2))
        assert float(value) == pytest.approx(float(alone.compute()), abs=1e-12)


def test_binary_views_do_not_share_an_update():
    arguments = {"from_logits": False, "task": "binary"}
    collection = MetricCollection([AURC(**arguments), KuiperCalibrationError(**arguments)])
    collection.update(torch.tensor([0.2, 0.9]), torch.tensor([0, 1]))
    collection.update(torch.tensor([0.2, 0.9]), torch.tensor([0, 1]))
    assert len(collection.compute_groups) == 2


@pytest.mark.parametrize("name", sorted(LABELS_ONLY))
def test_soft_targets_are_refused_where_they_have_no_meaning(name):
    cls, own = METRICS[name]
    metric = cls(from_logits=False, task="binary", **own)
    metric.update(torch.tensor([0.2, 0.9]), torch.tensor([0.0, 1.0]))
    with pytest.raises(ArgumentError, match="class indices"):
        metric.update(torch.tensor([0.2]), torch.tensor([0.4]))
    assert int(metric.counts.sum()) == 2


@pytest.mark.parametrize("resolution", [1, 2.0, True])
def test_a_bad_resolution_is_refused(resolution):
    with pytest.raises(ArgumentError, match="resolution"):
        AURC(from_logits=True, resolution=resolution)


def test_more_samples_than_float32_can_count():
    metric = filled(
        KolmogorovSmirnovCalibrationError(from_logits=False, task="binary"),
        np.full(4, 0.5),
        np.array([1, 0, 0, 0]),
    )
    for _ in range(23):  # doubles the state: 3.4e7 samples
        metric.merge_state(metric)
    metric.update(torch.tensor([0.5]), torch.tensor([0]))
    assert int(metric.counts.sum()) == 4 * 2**23 + 1
    assert float(metric.compute()) == pytest.approx(0.25, abs=1e-7)


@pytest.mark.parametrize("name", METRICS)
def test_sums_in_float32_where_float64_does_not_exist(name):
    def to_a_device_without_float64(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor

    cls, own = METRICS[name]
    metric = cls(from_logits=False, task="binary", **own)
    metric._apply(to_a_device_without_float64)
    exact = float(filled(cls(from_logits=False, task="binary", **own), TIED, CORRECT).value())
    value = filled(metric, TIED, CORRECT).compute()
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(exact, rel=1e-4, abs=1e-5)


def kept_on_rank(sizes):
    rank = torch.distributed.get_rank()
    first = sum(sizes[:rank])
    part = slice(first, first + sizes[rank])
    metric = AURC(from_logits=False, task="binary", exact=True)
    if sizes[rank]:
        metric.update(torch.tensor(CONFIDENCE[part]), torch.tensor(CORRECT[part]))
    return float(metric.compute()), len(metric.confidences)


@pytest.mark.parametrize("sizes", [(150, 50), (200, 0)])
def test_kept_confidences_are_gathered_from_uneven_and_empty_ranks(ranks, sizes):
    whole = filled(AURC(from_logits=False, task="binary", exact=True), CONFIDENCE, CORRECT)
    for rank, (value, batches) in enumerate(ranks.run(kept_on_rank, sizes)):
        assert value == pytest.approx(float(whole.compute()), abs=1e-12)
        assert batches == (1 if sizes[rank] else 0)
