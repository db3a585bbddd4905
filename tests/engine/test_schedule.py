"""Values of schedules at hand-computed positions."""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch

from lightning_reg.engine.closed_loop import ClosedLoop
from lightning_reg.engine.errors import ArgumentError, RegularizationError
from lightning_reg.engine.schedule import (
    CallableSchedule,
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    ScaledSchedule,
    Schedule,
    StepSchedule,
    WarmupSchedule,
)
from tests.engine.simple import Confidence, Host, loader, trainer

ALL = [
    ConstantSchedule(0.3),
    LinearSchedule(0.0, 1.0, start=10, end=20, by="step"),
    CosineSchedule(1.0, 0.5),
    ExponentialSchedule(1.0, 0.1, end=4, by="epoch"),
    WarmupSchedule(LinearSchedule(1.0, 3.0), length=0.5, by="progress"),
    StepSchedule([0, 1, 2], [5, 9]),
    CallableSchedule(math.sqrt, by="step"),
    ClosedLoop("val/ece", 0.1, 2.0),
]


@pytest.mark.parametrize(
    ("schedule", "position", "expected"),
    [
        (ALL[0], {"step": 7}, 0.3),
        (ALL[1], {"step": 5}, 0.0),
        (ALL[1], {"step": 12, "epoch": 99}, 0.2),
        (ALL[1], {"step": 25}, 1.0),
        (ALL[2], {"progress": 0.25}, 0.5 + 0.5 * (1 + math.sqrt(0.5)) / 2),
        (ALL[2], {"progress": 1.0}, 0.5),
        (ALL[3], {"epoch": 2}, math.sqrt(0.1)),
        (ALL[4], {"progress": 0.25}, 0.5 * 1.5),
        (ALL[4], {"progress": 0.75}, 2.5),
        (ALL[5], {"epoch": 4}, 0),
        (ALL[5], {"epoch": 5}, 1),
        (ALL[5], {"epoch": 30}, 2),
        (ALL[6], {"step": 16}, 4.0),
    ],
)
def test_value(schedule, position, expected):
    assert schedule.value(**position) == pytest.approx(expected, rel=1e-12)


def test_of_makes_constants_and_keeps_schedules():
    assert Schedule.of(2).value() == 2
    assert Schedule.of(ALL[1]) is ALL[1]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_copies_and_pickles_are_equal(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert copy.deepcopy(schedule) == schedule


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantSchedule(float("nan")),
        lambda: LinearSchedule(0, 1, by="step"),
        lambda: LinearSchedule(0, 1, start=3, end=3, by="step"),
        lambda: LinearSchedule(0, 1, by="batch"),
        lambda: ExponentialSchedule(0.0, 1.0),
        lambda: StepSchedule([1.0], [3]),
        lambda: StepSchedule([1.0, 2.0, 3.0], [3, 2]),
        lambda: WarmupSchedule(1.0, length=0),
        lambda: CallableSchedule(3),
        lambda: ClosedLoop("m", 0.1, 1.0, initial=-1.0),
        lambda: ClosedLoop("m", 0.1, 1.0, rate=0.0),
        lambda: ClosedLoop("m", 0.1, 1.0, patience=0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ArgumentError):
        make()


def _trainer(**metrics):
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), reduce=lambda t, reduce_op: t + 0.25
    )
    return SimpleNamespace(
        sanity_checking=False,
        global_step=4,
        strategy=strategy,
        callback_metrics=metrics,
        state=SimpleNamespace(fn=SimpleNamespace(value="fit")),
    )


def test_closed_loop_integrates_the_error_within_its_bounds():
    loop = ClosedLoop("ece", 0.1, gain=2.0, initial=0.5, high=1.0)
    loop.observe(0.2)
    assert loop.value() == pytest.approx(0.7)
    loop.observe(5.0)
    assert loop.value() == 1.0
    loop.observe(-5.0)
    assert loop.value() == 0.0
    loop.observe(float("nan"))
    assert loop.value() == 0.0


def test_closed_loop_averages_over_ranks_and_moves_once_per_validation():
    loop = ClosedLoop("ece", 0.25, gain=1.0)
    trainer = _trainer(ece=torch.tensor(1.0))
    loop.on_validation_end(trainer)
    loop.on_validation_end(trainer)
    assert loop.value() == 1.0
    trainer.global_step = 5
    loop.on_validation_end(trainer)
    assert loop.value() == 2.0


def test_closed_loop_does_not_move_in_the_sanity_check():
    loop = ClosedLoop("ece", 0.0, gain=1.0)
    trainer = _trainer(ece=torch.tensor(1.0))
    trainer.sanity_checking = True
    loop.on_validation_end(trainer)
    assert loop.value() == 0.0


def test_closed_loop_resumes_where_it_was():
    loop, other = ClosedLoop("ece", 0.0, gain=1.0), ClosedLoop("ece", 0.0, gain=1.0)
    loop.on_validation_end(_trainer(ece=torch.tensor(1.0)))
    other.load_state_dict(loop.state_dict())
    assert other == loop


def test_closed_loop_names_a_metric_that_was_not_logged():
    with pytest.raises(RegularizationError, match=r"'ece'.*it logged accuracy"):
        ClosedLoop("ece", 0.0, gain=1.0).on_validation_end(_trainer(accuracy=torch.tensor(1.0)))


def test_a_strength_in_closed_loop_moves_with_validation_and_survives_a_resume(tmp_path):
    def fit(loop, max_epochs, **kwargs):
        module = Host()
        module.validation_step = lambda batch, batch_idx: module.log("m", 1.0)
        run = trainer([Confidence(loop)], max_epochs=max_epochs)
        run.fit(module, loader(), loader(), **kwargs)
        return run

    first, second = (ClosedLoop("m", 0.0, gain=0.25) for _ in range(2))
    fit(first, 2).save_checkpoint(tmp_path / "c.ckpt")
    assert first.value() == 0.5
    fit(second, 3, ckpt_path=tmp_path / "c.ckpt")
    assert second.value() == 0.75


def test_a_scaled_schedule_is_the_product_at_every_position():
    scaled = ScaledSchedule(LinearSchedule(0.0, 4.0, end=4, by="step"), 0.5)
    assert [scaled.value(step=s) for s in (0, 1, 4, 9)] == [0.0, 0.5, 2.0, 2.0]
    assert ScaledSchedule(3.0, 0.5).value() == 1.5
