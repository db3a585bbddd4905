"""The calibration error against the textbook, and what its state promises."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from lightning_reg.engine import ArgumentError
from lightning_reg.metrics import CalibrationError, ReliabilityBins, calibration_error

_rng = np.random.default_rng(0)
LOGITS = _rng.normal(size=(500, 5)) * 2
TARGETS = _rng.integers(0, 5, 500)


def textbook(logits, targets, n_bins=15, norm="l1"):
    """Softmax, histogram, difference: in NumPy, with a mask for each bin."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    confidence = p.max(1)
    correct = (
        targets[np.arange(len(p)), p.argmax(1)] if targets.ndim == 2 else p.argmax(1) == targets
    )
    gaps, shares = [], []
    for b in range(n_bins):
        inside = (confidence >= b / n_bins) & (confidence < (b + 1) / n_bins)
        inside |= (b == n_bins - 1) & (confidence == 1)
        if inside.any():
            gaps.append(abs(correct[inside].mean() - confidence[inside].mean()))
            shares.append(inside.mean())
    gaps, shares = np.array(gaps), np.array(shares)
    return {
        "l1": (shares * gaps).sum(),
        "l2": np.sqrt((shares * gaps**2).sum()),
        "max": gaps.max(),
    }[norm]


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_equals_the_textbook(norm, n_bins):
    value = calibration_error(
        torch.tensor(LOGITS), torch.tensor(TARGETS), from_logits=True, n_bins=n_bins, norm=norm
    )
    assert abs(float(value) - textbook(LOGITS, TARGETS, n_bins, norm)) < 1e-9


def test_probabilities_and_logits_agree():
    probabilities = torch.tensor(LOGITS).softmax(1)
    one = calibration_error(probabilities, torch.tensor(TARGETS), from_logits=False)
    other = calibration_error(torch.tensor(LOGITS), torch.tensor(TARGETS), from_logits=True)
    assert abs(float(one - other)) < 1e-12


def test_confidence_one_belongs_to_the_last_bin():
    predictions = torch.tensor([[0.95, 0.05], [1.0, 0.0]])
    value = calibration_error(predictions, torch.tensor([0, 1]), from_logits=False)
    assert float(value) == pytest.approx(0.475, abs=1e-7)


def test_an_edge_opens_its_bin():
    bins = CalibrationError(from_logits=False, task="binary", n_bins=4)
    bins.update(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), torch.ones(5, dtype=torch.long))
    assert bins.counts.tolist() == [1, 1, 1, 2]


def test_soft_targets_count_the_expected_correctness():
    soft = np.random.default_rng(1).dirichlet(np.ones(5), 500)
    value = calibration_error(torch.tensor(LOGITS), torch.tensor(soft), from_logits=True)
    assert abs(float(value) - textbook(LOGITS, soft)) < 1e-9


def test_soft_targets_that_are_certain_equal_labels():
    one_hot = torch.nn.functional.one_hot(torch.tensor(TARGETS), 5).double()
    soft = calibration_error(torch.tensor(LOGITS), one_hot, from_logits=True)
    hard = calibration_error(torch.tensor(LOGITS), torch.tensor(TARGETS), from_logits=True)
    assert float(soft) == pytest.approx(float(hard), abs=1e-12)


def test_binary_task_judges_the_positive_class():
    scores = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = (torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.3).long()
    value = calibration_error(scores, target, from_logits=False, task="binary", n_bins=10)
    # No score is 0 or 1 or on an edge, where the two disagree.
    reference = binary_calibration_error(scores, target, n_bins=10)
    assert float(value) == pytest.approx(float(reference), abs=1e-6)
    logits = calibration_error(scores.logit(), target, from_logits=True, task="binary", n_bins=10)
    assert float(logits) == pytest.approx(float(value), abs=1e-9)


def test_ignored_positions_do_not_count():
    target = torch.tensor(TARGETS)
    target[::3] = -100
    kept = np.arange(500) % 3 != 0
    value = calibration_error(torch.tensor(LOGITS), target, from_logits=True, ignore_index=-100)
    assert abs(float(value) - textbook(LOGITS[kept], TARGETS[kept])) < 1e-9


def test_dense_predictions_are_rows():
    dense = torch.tensor(LOGITS).view(25, 4, 5, 5).permute(0, 3, 1, 2)
    target = torch.tensor(TARGETS).view(25, 4, 5)
    value = calibration_error(dense, target, from_logits=True)
    assert abs(float(value) - textbook(LOGITS, TARGETS)) < 1e-9


@pytest.mark.parametrize("batches", [1, 7, 40])
def test_any_split_into_batches_gives_the_same_counts(batches):
    metric = CalibrationError(from_logits=True)
    for x, y in zip(
        torch.tensor(LOGITS).chunk(batches), torch.tensor(TARGETS).chunk(batches), strict=True
    ):
        metric.update(x, y)
    assert abs(float(metric.compute()) - textbook(LOGITS, TARGETS)) < 1e-12
    assert int(metric.counts.sum()) == 500


def test_more_samples_than_float32_can_count():
    metric = CalibrationError(from_logits=False, task="binary", n_bins=2)
    metric.update(torch.full((4,), 0.5), torch.tensor([1, 0, 0, 0]))
    for _ in range(23):  # doubles the state: 3.4e7 samples
        metric.counts, metric.confidence_sum, metric.correct_sum = (
            ReliabilityBins(*metric.bins()) + metric.bins()
        )
    assert int(metric.counts.sum()) == 4 * 2**23
    metric.update(torch.tensor([0.5]), torch.tensor([0]))
    assert int(metric.counts.sum()) == 4 * 2**23 + 1
    assert float(metric.compute()) == pytest.approx(0.25, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_read_in_high_precision(dtype):
    logits = torch.tensor(LOGITS).to(dtype)
    value = calibration_error(logits, torch.tensor(TARGETS), from_logits=True)
    assert abs(float(value) - textbook(logits.double().numpy(), TARGETS)) < 1e-9


def test_nan_rows_are_left_out_and_reported():
    logits = torch.tensor(LOGITS)
    logits[3, 1], logits[7, 0] = float("nan"), float("inf")
    kept = [i for i in range(500) if i not in (3, 7)]
    metric = CalibrationError(from_logits=True)
    metric.update(logits, torch.tensor(TARGETS))
    with pytest.warns(UserWarning, match="2 predictions held NaN"):
        value = metric.compute()
    assert abs(float(value) - textbook(LOGITS[kept], TARGETS[kept])) < 1e-9


def test_nan_targets_are_left_out_too():
    soft = np.random.default_rng(1).dirichlet(np.ones(5), 500)
    kept = np.arange(500) != 3
    expected = textbook(LOGITS[kept], soft[kept])
    soft[3, 1] = np.nan
    value = calibration_error(torch.tensor(LOGITS), torch.tensor(soft), from_logits=True)
    assert abs(float(value) - expected) < 1e-9


def test_a_masked_class_is_no_invalid_row():
    logits = torch.tensor(LOGITS)
    logits[:, 4] = -float("inf")
    value = calibration_error(logits, torch.tensor(TARGETS), from_logits=True)
    assert abs(float(value) - textbook(LOGITS[:, :4], TARGETS)) < 1e-9


def test_nothing_counted_is_nan():
    empty = torch.zeros(0, 5)
    for norm in ("l1", "l2", "max"):
        value = calibration_error(empty, torch.zeros(0).long(), from_logits=True, norm=norm)
        assert torch.isnan(value)


def test_forward_gives_the_batch_and_keeps_the_whole():
    metric = CalibrationError(from_logits=True)
    halves = [
        (torch.tensor(LOGITS[s]), torch.tensor(TARGETS[s])) for s in (slice(250), slice(250, 500))
    ]
    for (x, y), part in zip(halves, (slice(250), slice(250, 500)), strict=True):
        assert abs(float(metric(x, y)) - textbook(LOGITS[part], TARGETS[part])) < 1e-9
    assert abs(float(metric.compute()) - textbook(LOGITS, TARGETS)) < 1e-9
    metric.reset()
    assert int(metric.counts.sum()) == 0


def filled() -> CalibrationError:
    metric = CalibrationError(from_logits=True)
    metric.update(torch.tensor(LOGITS), torch.tensor(TARGETS))
    return metric


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_carry_the_state(duplicate):
    assert float(duplicate(filled()).compute()) == float(filled().compute())


def test_state_dict_carries_the_state():
    source, buffer = filled(), io.BytesIO()
    source.persistent(True)
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target = CalibrationError(from_logits=True)
    target.persistent(True)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert float(target.compute()) == float(source.compute())


def test_a_tensor_that_the_caller_reuses_changes_nothing():
    logits, target = torch.tensor(LOGITS, requires_grad=True), torch.tensor(TARGETS)
    metric = CalibrationError(from_logits=True)
    metric.update(logits, target)
    before = float(metric.compute())
    with torch.no_grad():
        logits.zero_()
    target.zero_()
    metric.update(torch.zeros(0, 5), torch.zeros(0).long())
    assert float(metric.compute()) == before
    assert not metric.confidence_sum.requires_grad


def test_state_of_inference_mode_can_be_updated_outside():
    metric = CalibrationError(from_logits=True)
    with torch.inference_mode():
        metric.reset()
        metric.update(torch.tensor(LOGITS), torch.tensor(TARGETS))
    metric.update(torch.tensor(LOGITS), torch.tensor(TARGETS))
    assert int(metric.counts.sum()) == 1000


def test_sums_fall_back_to_float32_where_float64_does_not_exist():
    def to_a_device_without_float64(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor

    metric = filled()
    metric._apply(to_a_device_without_float64)
    assert metric.confidence_sum.dtype == torch.float32
    assert metric.counts.dtype == torch.int64
    metric.update(torch.tensor(LOGITS), torch.tensor(TARGETS))
    assert metric.confidence_sum.dtype == torch.float32
    assert float(metric.compute()) == pytest.approx(textbook(LOGITS, TARGETS), abs=1e-6)
    metric.reset()
    assert metric.confidence_sum.dtype == torch.float32


def shard(rank: int, sizes: tuple[int, ...]):
    first = sum(sizes[:rank])
    part = slice(first, first + sizes[rank])
    metric = CalibrationError(from_logits=True)
    metric.update(torch.tensor(LOGITS[part]), torch.tensor(TARGETS[part]))
    return metric


def compute_on_rank(sizes: tuple[int, ...]):
    metric = shard(torch.distributed.get_rank(), sizes)
    with metric.sync_context():
        counts = metric.counts.tolist()
    return float(metric.compute()), counts, int(metric.counts.sum())


@pytest.mark.parametrize("sizes", [(250, 250), (400, 100), (500, 0)])
def test_two_ranks_equal_one_process(ranks, sizes):
    for rank, (value, counts, own) in enumerate(ranks.run(compute_on_rank, sizes)):
        assert counts == filled().counts.tolist()
        assert value == pytest.approx(float(filled().compute()), abs=1e-12)
        assert own == sizes[rank]


def test_the_diagram_is_drawn_from_the_state():
    metric = filled()
    _, axes = metric.plot()
    heights = [bar.get_height() for bar in axes.containers[0]]
    filled_bins = metric.counts > 0
    expected = (metric.correct_sum / metric.counts)[filled_bins]
    assert heights == pytest.approx(expected.tolist())
    assert f"ECE {float(metric.compute()):.4f}" in axes.texts[0].get_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_bins": 0}, "n_bins=15"),
        ({"norm": "l3"}, "l1, l2, max"),
        ({"task": "regression"}, "binary, multiclass"),
        ({"from_logits": None}, "from_logits=True"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        CalibrationError(**{"from_logits": True, **arguments})


def test_logits_are_never_guessed():
    with pytest.raises(TypeError, match="from_logits"):
        CalibrationError()
    with pytest.raises(ArgumentError, match="from_logits=True"):
        calibration_error(torch.tensor(LOGITS), torch.tensor(TARGETS), from_logits=False)


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (torch.rand(4), torch.zeros(4).long(), "N, C"),
        (torch.rand(4, 1), torch.zeros(4).long(), "two classes"),
        (torch.rand(4, 3), torch.zeros(3).long(), "class indices"),
        (torch.rand(4, 3), torch.rand(4), "soft"),
        (torch.rand(4, 3), torch.full((4,), 3), "outside their range"),
        (torch.rand(4, 3), torch.full((4,), -100), "ignore_index"),
        (torch.zeros(4, 3).long(), torch.zeros(4).long(), "float predictions"),
    ],
)
def test_bad_tensors_are_refused(preds, target, message):
    with pytest.raises(ArgumentError, match=message):
        calibration_error(preds, target, from_logits=True)


def test_rows_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ArgumentError, match="sum to one"):
        calibration_error(torch.full((3, 4), 0.5), torch.zeros(3).long(), from_logits=False)
