"""Correctness-aware calibration: its loss, what it separates, and what never changes."""

import pytest
import torch

from lightning_reg.calibrators.correctness_aware import CorrectnessAwareCalibration
from lightning_reg.engine import ArgumentError
from lightning_reg.engine.communicator import Communicator

_draws = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(2000, 5, generator=_draws)
RIGHT = torch.rand(2000, generator=_draws) < 0.7
LABELS = torch.where(RIGHT, LOGITS.argmax(1), LOGITS.argmin(1))
# Views agree with the prediction where it is right, and not where it is wrong.
_NOISE = 3 * torch.randn(2000, 3, 5, generator=_draws)
VIEWS = torch.where(RIGHT.view(-1, 1, 1), LOGITS.unsqueeze(1) + 0.1 * _NOISE, _NOISE)


def fitted(**kwargs):
    settings = {"lr": 1e-2, "epochs": 40, "batch_size": 200, **kwargs}
    return CorrectnessAwareCalibration(**settings).fit(LOGITS, LABELS, views=VIEWS)


def loss(logits):
    """The paper's, with weights that balance right and wrong."""
    confidence = logits.softmax(1).amax(1)
    right = RIGHT.float()
    weights = torch.where(RIGHT, 1 - right.mean(), right.mean())
    return float((weights * (confidence - right).square()).sum() / weights.sum())


def test_confidence_rises_where_right_and_falls_where_wrong():
    calibrated = fitted().calibrate(LOGITS, VIEWS)
    assert torch.equal(calibrated.argmax(1), LOGITS.argmax(1))
    confidence, before = calibrated.softmax(1).amax(1), LOGITS.softmax(1).amax(1)
    assert confidence[RIGHT].mean() > before[RIGHT].mean() + 0.02
    assert confidence[~RIGHT].mean() < before[~RIGHT].mean() - 0.1
    temperatures = torch.logspace(-1, 1, 100)
    best_single = min(loss(LOGITS / t) for t in temperatures)
    assert loss(calibrated) < 0.9 * best_single


def test_one_step_of_the_released_settings_descends_the_papers_loss():
    head = CorrectnessAwareCalibration(epochs=1, batch_size=2000, lr=1e-3)
    start = CorrectnessAwareCalibration(epochs=1, batch_size=2000, lr=1e-12)
    head.fit(LOGITS, LABELS, views=VIEWS)
    start.fit(LOGITS, LABELS, views=VIEWS)
    assert loss(head.calibrate(LOGITS, VIEWS)) < loss(start.calibrate(LOGITS, VIEWS))


def test_views_that_say_nothing_leave_one_temperature_at_the_minimum_of_the_loss():
    views = torch.zeros_like(VIEWS)
    head = CorrectnessAwareCalibration(lr=2e-2, epochs=100, batch_size=2000)
    head.fit(LOGITS, LABELS, views=views)
    temperatures = torch.linspace(0.2, 9.8, 1000)
    expected = min(temperatures, key=lambda t: loss(LOGITS / t))
    found = (LOGITS / head.calibrate(LOGITS, views))[0, 0]
    assert float(found) == pytest.approx(float(expected), rel=0.02)


def test_temperatures_stay_in_their_range():
    ratio = LOGITS / fitted(lr=1.0).calibrate(LOGITS, VIEWS)
    assert ratio.min() > 0.0999
    assert ratio.max() < 10.001


def test_views_are_read_at_the_originals_largest_classes():
    head = fitted()
    p = VIEWS.double().softmax(2)
    top = LOGITS.topk(4, 1).indices
    expected = torch.cat([p[:, v].gather(1, top) for v in range(3)], 1)
    torch.testing.assert_close(head.features(LOGITS.double(), VIEWS), expected)


def test_views_have_to_be_those_of_the_fit():
    with pytest.raises(ArgumentError, match="3 views"):
        fitted(epochs=1).calibrate(LOGITS)
    alone = CorrectnessAwareCalibration(epochs=1).fit(LOGITS, LABELS)
    assert alone.calibrate(LOGITS).shape == LOGITS.shape


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fitted(epochs=1)
    assert torch.equal(torch.rand(1), expected)


def test_ignored_rows_do_not_count():
    labels = torch.cat([LABELS, torch.full((9,), -100)])
    logits, views = torch.cat([LOGITS, LOGITS[:9]]), torch.cat([VIEWS, VIEWS[:9]])
    head = CorrectnessAwareCalibration(lr=1e-2, ignore_index=-100)
    plain = CorrectnessAwareCalibration(lr=1e-2).fit(LOGITS, LABELS, views=VIEWS)
    head.fit(logits, labels, views=views)
    assert torch.equal(head.first_weight, plain.first_weight)


def _on_rank(parts):
    rank = torch.distributed.get_rank()
    own = parts[rank]
    head = CorrectnessAwareCalibration(lr=1e-2, batch_size=300)
    head.fit(LOGITS[own], LABELS[own], views=VIEWS[own], comm=Communicator(rank, 2))
    return head.first_weight


def test_two_ranks_train_the_network_of_one(ranks):
    order = torch.randperm(2000, generator=_draws)
    head = CorrectnessAwareCalibration(lr=1e-2, batch_size=300)
    head.fit(LOGITS, LABELS, views=VIEWS)
    for found in ranks.run(_on_rank, [order[:900], order[900:]]):
        assert torch.equal(found, head.first_weight)


@pytest.mark.parametrize("arguments", [{"top_k": 0}, {"lr": 0.0}, {"epochs": 1.5}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="CorrectnessAwareCalibration"):
        CorrectnessAwareCalibration(**arguments)
