"""A closed loop reaches its target, alike on all ranks and over a resume, or says why not."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import ConfidencePenalty
from lightning_reg.engine import Regularizer
from lightning_reg.engine.closed_loop import ClosedLoop
from lightning_reg.engine.errors import RegularizationError
from lightning_reg.engine.schedule import Schedule, WarmupSchedule
from lightning_reg.monitors import CalibrationMonitor
from lightning_reg.testing import rank_trainer
from tests.engine.simple import Confidence, Host, loader, trainer


def steer(loop, plant, steps):
    """Metrics of a plant that answers to the loop's number."""
    seen = []
    for _ in range(steps):
        seen.append(plant(loop.value()))
        loop.observe(seen[-1])
    return seen


def test_the_error_shrinks_by_one_minus_gain_times_slope():
    loop = ClosedLoop("ece", target=0.05, gain=2.0)
    errors = [m - 0.05 for m in steer(loop, lambda s: 0.25 - 0.3 * s, 12)]
    assert errors == pytest.approx([0.2 * (1 - 2.0 * 0.3) ** n for n in range(12)], abs=1e-9)


def test_reaches_the_target_of_a_curved_and_noisy_plant_from_both_sides():
    noise = torch.Generator().manual_seed(0)

    def plant(strength):
        return 0.2 / (1 + strength) + 0.002 * float(torch.randn((), generator=noise))

    for initial in (0.0, 20.0):
        loop = ClosedLoop("ece", target=0.05, gain=15.0, initial=initial)
        late = steer(loop, plant, 80)[40:]
        assert sum(late) / len(late) == pytest.approx(0.05, abs=0.001)
        assert loop.value() == pytest.approx(3.0, abs=0.7)


def test_a_negative_gain_steers_a_metric_that_rises_with_the_number():
    loop = ClosedLoop("entropy", target=1.0, gain=-0.5, initial=3.0)
    assert steer(loop, lambda s: 0.4 * s, 60)[-1] == pytest.approx(1.0, abs=1e-3)
    assert loop.value() == pytest.approx(2.5, abs=1e-2)


def test_an_unreachable_target_holds_the_bound_and_leaves_it_at_once():
    loop = ClosedLoop("ece", target=0.05, gain=2.0, low=0.5, high=1.5, initial=1.0)
    steer(loop, lambda s: 0.5, 50)
    assert loop.value() == 1.5
    # Nothing was wound up beyond the bound.
    loop.observe(0.04)
    assert loop.value() == pytest.approx(1.48)
    steer(loop, lambda s: 0.0, 50)
    assert loop.value() == 0.5


def test_rate_bounds_each_move():
    loop = ClosedLoop("ece", target=0.0, gain=10.0, rate=0.25, initial=1.0)
    loop.observe(5.0)
    assert loop.value() == 1.25
    loop.observe(-5.0)
    assert loop.value() == 1.0
    loop.observe(0.01)
    assert loop.value() == pytest.approx(1.1)


def test_patience_waits_for_validations_on_the_same_side_in_a_row():
    loop = ClosedLoop("ece", target=0.1, gain=1.0, patience=3, initial=1.0)
    values = []
    for metric in (0.2, 0.2, 0.0, 0.2, 0.2, 0.2, 0.2, 0.1, 0.2):
        loop.observe(metric)
        values.append(loop.value())
    assert values == pytest.approx([1, 1, 1, 1, 1, 1.1, 1.2, 1.2, 1.2])


def test_small_numbers_are_not_rounded_away():
    loop = ClosedLoop("ece", target=0.0, gain=1e-15)
    loop.observe(0.125)
    assert loop.value() == 1.25e-16


class Overconfident(L.LightningModule):
    """Learns a third of the labels by heart, which are wrong."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def digits():
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    draws = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=draws) < 0.3
    y = torch.where(wrong, torch.randint(0, 10, y.shape, generator=draws), y)
    train = DataLoader(TensorDataset(x[:600], y[:600]), batch_size=100)
    return train, DataLoader(TensorDataset(x[600:], y[600:]), batch_size=1200)


def test_a_penalty_on_confidence_takes_it_down_to_the_accuracy():
    train, held_out = digits()

    def late(strength):
        monitor = CalibrationMonitor(figures=False, metrics=["confidence_gap"])
        run = trainer([ConfidencePenalty(strength), monitor], max_epochs=60)
        run.fit(Overconfident(), train, held_out)
        history = monitor.history["val"]
        gaps = [entry["confidence_gap"] for entry in history[-10:]]
        return gaps, [entry["strength/confidence_penalty"] for entry in history]

    free, _ = late(0.0)
    loop = ClosedLoop("val/confidence_gap", target=0.0, gain=2.0, high=5.0)
    steered, strengths = late(loop)
    # Measured: from 0.20 to 0.23 without, and 0.01 on average with the loop.
    assert min(free) > 0.15
    assert sum(steered) / 10 == pytest.approx(0.0, abs=0.04)
    # Not confident enough at first: nothing to hold back.
    assert strengths[:5] == [0.0] * 5
    assert 0.2 < strengths[-1] < 2.0


class Inner(Regularizer):
    """A technique with a second number that follows a schedule."""

    needs = ("logits",)

    def __init__(self, strength, temperature):
        super().__init__(strength)
        self.temperature = temperature

    def penalty(self, step):
        return (step.logits / Schedule.of(self.temperature).value()).square().mean()


def observed(epochs, techniques, **kwargs):
    class Logs(Host):
        def validation_step(self, batch, batch_idx):
            self.log("m", 1.0 + self.current_epoch)

    run = trainer(techniques, max_epochs=epochs, enable_checkpointing=True)
    run.fit(Logs(), loader(), loader(), **kwargs)
    return run


def loops():
    return ClosedLoop("m", 0.0, gain=0.25, patience=2), ClosedLoop("m", 0.0, gain=1.0)


def test_loops_inside_a_warmup_and_in_other_arguments_move_and_resume(tmp_path):
    def fit(epochs, **kwargs):
        first, second = loops()
        save = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        technique = Inner(WarmupSchedule(first, length=2, by="epoch"), second)
        observed(epochs, [technique, save], **kwargs)
        return first, second

    straight = fit(4)
    halfway = fit(2)
    resumed = fit(4, ckpt_path=tmp_path / "2" / "last.ckpt")
    assert [loop.value() for loop in halfway] == [0.5, 3.0]
    assert [loop.value() for loop in straight] == [0.5 + 0.75 + 1.0, 10.0]
    assert resumed == straight


def test_a_loop_moves_in_a_fit_only():
    loop = ClosedLoop("m", 0.0, gain=1.0)
    run = observed(1, [Confidence(loop)])
    assert loop.value() == 1.0

    class Logs(Host):
        def validation_step(self, batch, batch_idx):
            self.log("m", 5.0)

    run = trainer([Confidence(loop)])
    run.validate(Logs(), loader(), verbose=False)
    assert loop.value() == 1.0


def test_a_fit_without_validation_is_refused():
    loop = ClosedLoop("val/ece", 0.0, gain=1.0)
    with pytest.raises(RegularizationError, match=r"'val/ece' after each validation.*has none"):
        trainer([Confidence(loop)]).fit(Host(), loader())


def test_a_metric_that_never_appears_is_named_with_what_there_is():
    loop = ClosedLoop("val/ecce", 0.0, gain=1.0)
    callbacks = [Confidence(loop), CalibrationMonitor(figures=False)]

    class Quiet(Host):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    with pytest.raises(
        RegularizationError, match=r"'val/ecce'.*val/accuracy, val/ece, val/entropy"
    ):
        trainer(callbacks).fit(Quiet(), loader(), loader())


class Differs(Host):
    """Logs another value on each rank, as an unsynchronized metric would."""

    def validation_step(self, batch, batch_idx):
        self.log("m", float(self.global_rank) / 3, sync_dist=False)


def follow_on_ranks():
    loop = ClosedLoop("m", 0.0, gain=1.0 / 7)
    run = rank_trainer(callbacks=[Confidence(loop)], max_epochs=3)
    run.fit(Differs(), loader(8), loader(8))
    return loop.value()


def test_ranks_keep_the_same_number_bit_for_bit(ranks):
    first, second = ranks.run(follow_on_ranks)
    assert first == second
    assert first == pytest.approx(3 / 42, rel=1e-6)
