"""Gaps against a recomputation, each sample counted once, and nothing of the run changed."""

import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_reg.engine import ArgumentError, Regularizer
from lightning_reg.engine.closed_loop import ClosedLoop
from lightning_reg.metrics import calibration_error, predictive_entropy, probability_margin
from lightning_reg.monitors import CalibrationMonitor, OverfitMonitor
from lightning_reg.testing import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Ascent, Confidence, Host, trainer, weights
from tests.monitors.test_calibration_figures import saved_and_loaded, texts

TRAIN, HELD_OUT = slice(0, 40), slice(40, 64)


class Quiet(Host):
    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss)
        self.accuracy(self.net(batch[0]), batch[1])
        return {"logits": self.net(batch[0]), "loss": loss}


def data(part, size=16, kind=DataLoader):
    return kind(TensorDataset(INPUTS[part], LABELS[part]), batch_size=size)


def monitor(**kwargs):
    return OverfitMonitor(figures=False, **kwargs)


def values(module, x, y):
    module.eval()
    with torch.no_grad():
        logits = module(x)
    return {
        "loss": float(F.cross_entropy(logits.double(), y)),
        "accuracy": float((logits.argmax(1) == y).double().mean()),
        "ece": float(calibration_error(logits, y, from_logits=True)),
        "entropy": float(predictive_entropy(logits, from_logits=True)),
        "margin": float(probability_margin(logits, y, from_logits=True)),
    }


def gaps(module, x=INPUTS[TRAIN], y=LABELS[TRAIN], held=HELD_OUT):
    train, held_out = values(module, x, y), values(module, INPUTS[held], LABELS[held])
    return {name: held_out[name] - train[name] for name in train}


def check(found, wanted, suffix=""):
    for name, value in wanted.items():
        assert float(found[f"gap/{name}{suffix}"]) == pytest.approx(value, abs=1e-6), name


STILL = {"lr": 0.0}


class Swap(Regularizer):
    """Gives each sample its partner's label altogether."""

    def transform_batch(self, step):
        order = torch.arange(len(step.targets)).flip(0)
        step.mix_targets(order, torch.zeros(len(order)))


@pytest.mark.parametrize("ours", [{}, {"train_data": 40}])
@pytest.mark.parametrize("techniques", [[], [Confidence(0.1), Ascent(0.05)], [Confidence(0.0)]])
def test_gaps_of_weights_that_stand_still(ours, techniques):
    module, run = Quiet(**STILL), trainer([monitor(**ours), *techniques])
    run.fit(module, data(TRAIN), data(HELD_OUT, 10))
    check(run.callback_metrics, gaps(module))


def test_mixed_labels_are_those_that_were_trained_on():
    module, run = Quiet(**STILL), trainer([Swap(), monitor()], max_epochs=1)
    run.fit(module, data(TRAIN, 40), data(HELD_OUT))
    check(run.callback_metrics, gaps(module, y=LABELS[TRAIN].flip(0)))


def test_the_training_side_covers_the_steps_since_the_last_validation():
    module, ours = Quiet(**STILL), monitor()
    run = trainer([ours], max_epochs=1, val_check_interval=2, num_sanity_val_steps=1)
    run.fit(module, data(slice(0, 48), 12), data(HELD_OUT))
    first, second = ours.history["val"]
    for entry, part in ((first, slice(0, 24)), (second, slice(24, 48))):
        wanted = values(module, INPUTS[part], LABELS[part])
        found = {name: entry[f"train_{name}"] for name in wanted}
        assert found == pytest.approx(wanted, abs=1e-6)


def test_a_fit_that_stopped_inside_an_epoch_leaves_nothing_to_the_next():
    module, ours = Quiet(**STILL), monitor()
    trainer([ours], max_steps=1, max_epochs=-1).fit(module, data(HELD_OUT, 8), data(HELD_OUT))
    run = trainer([ours], max_epochs=1)
    run.fit(module, data(TRAIN), data(HELD_OUT))
    check(run.callback_metrics, gaps(module))


def test_a_fixed_part_is_seen_in_evaluation_mode_with_the_weights_of_now():
    part = TensorDataset(INPUTS[5:25], LABELS[5:25])
    module, run = Quiet(dropout=0.5, batch_norm=True), trainer([monitor(train_data=part)])
    run.fit(module, data(TRAIN), data(HELD_OUT))
    check(run.callback_metrics, gaps(module, INPUTS[5:25], LABELS[5:25]))


def test_the_drawn_part_is_the_same_each_time():
    ours = monitor(train_data=11)
    run = trainer([ours], max_epochs=2)
    run.fit(
        Quiet(**STILL), DataLoader(TensorDataset(INPUTS, LABELS), 16, shuffle=True), data(HELD_OUT)
    )
    one, other = (
        {k: v for k, v in entry.items() if k.startswith("train_")} for entry in ours.history["val"]
    )
    assert one == other
    assert 0 < one["train_accuracy"] * 11 == pytest.approx(round(one["train_accuracy"] * 11))


@pytest.mark.parametrize("ours", [{}, {"train_data": 20}])
@pytest.mark.parametrize("techniques", [[], [Confidence(0.1), Ascent(0.05)]])
def test_the_run_is_bit_equal_to_one_without_the_monitor(ours, techniques):
    def fit(callbacks):
        torch.manual_seed(3)
        module, run = Quiet(dropout=0.3, batch_norm=True), trainer(callbacks)
        run.fit(module, DataLoader(TensorDataset(INPUTS, LABELS), 16, shuffle=True), data(HELD_OUT))
        logs = {k: float(v) for k, v in run.callback_metrics.items() if "gap/" not in k}
        return weights(module), logs, [len(m._forward_hooks) for m in module.modules()]

    with_it, without = fit([monitor(**ours), *techniques]), fit(techniques)
    assert torch.equal(with_it[0], without[0])
    assert with_it[1:] == without[1:]


def test_several_dataloaders_have_their_gaps_to_one_training_side():
    class Several(Quiet):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    for ours in ({}, {"train_data": 40}):
        module, run = Several(**STILL), trainer([monitor(**ours)], max_epochs=1)
        parts = [slice(40, 50), slice(50, 64)]
        run.fit(module, data(TRAIN), [data(part) for part in parts])
        for index, part in enumerate(parts):
            check(run.callback_metrics, gaps(module, held=part), f"/dataloader_idx_{index}")


def test_a_validation_outside_a_fit_logs_no_gap():
    run = trainer([monitor()])
    run.validate(Quiet(), data(HELD_OUT), verbose=False)
    assert not [key for key in run.callback_metrics if "gap" in key]


def test_manual_optimization():
    class Manual(Quiet):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.optimizers().step()

    module, run = Manual(**STILL), trainer([monitor()], max_epochs=1)
    run.fit(module, data(TRAIN), data(HELD_OUT))
    check(run.callback_metrics, gaps(module))


def test_under_the_other_import_name():
    other = importlib.import_module("pytorch_lightning")

    class Module(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(8, 4)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    for ours in ({}, {"train_data": 40}):
        calibration = CalibrationMonitor(figures=False)
        run = other.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[monitor(**ours), calibration],
        )
        module = Module()
        run.fit(module, data(TRAIN), data(HELD_OUT))
        check(run.callback_metrics, gaps(module))
        assert len(calibration.history["val"]) == 1


def test_resume_in_the_middle_of_an_epoch(tmp_path):
    def fit(name, epochs=2, **kwargs):
        ours, save = monitor(), ModelCheckpoint(tmp_path / name, every_n_train_steps=5)
        run = trainer([ours, save], max_epochs=epochs, enable_checkpointing=True)
        run.fit(Quiet(), data(TRAIN, 10, StatefulDataLoader), data(HELD_OUT), **kwargs)
        return ours

    straight = fit("straight")
    (path,) = (tmp_path / "straight").glob("*step=5.ckpt")
    resumed = fit("resumed", ckpt_path=path)
    assert len(resumed.history["val"]) == 2
    assert resumed.history["val"][1] == pytest.approx(straight.history["val"][1], abs=1e-12)


def fit_on_ranks(size, techniques, **ours):
    module = Quiet(**STILL)
    run = rank_trainer(callbacks=[monitor(**ours), *techniques], max_epochs=1)
    run.fit(module, data(slice(0, size), 8), data(slice(0, 37), 8))
    found = {k: float(v) for k, v in run.callback_metrics.items() if k.startswith("gap/")}
    return found, gaps(module, INPUTS[:size], LABELS[:size], held=slice(0, 37))


@pytest.mark.parametrize(
    ("techniques", "ours"), [([], {}), ([Confidence(0.1), Ascent()], {}), ([], {"train_data": 61})]
)
def test_two_ranks_equal_one_process_and_repeats_count_once(ranks, techniques, ours):
    for found, wanted in ranks.run(fit_on_ranks, 61, techniques, **ours):
        check(found, wanted)


def interrupted_on_ranks(folder):
    def fit(**kwargs):
        ours = monitor()
        save = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
        run = rank_trainer(
            callbacks=[ours, save], max_epochs=1, enable_checkpointing=True, default_root_dir=folder
        )
        run.fit(Quiet(**STILL), data(slice(0, 48), 8, StatefulDataLoader), data(HELD_OUT), **kwargs)
        return ours.history["val"][-1], save.best_model_path

    first, path = fit()
    again, _ = fit(ckpt_path=path)
    return first, again


def test_a_checkpoint_holds_what_all_ranks_counted(ranks, tmp_path):
    for first, again in ranks.run(interrupted_on_ranks, str(tmp_path)):
        assert again == pytest.approx(first, abs=1e-12)


def test_a_closed_loop_follows_a_gap():
    loop = ClosedLoop("gap/margin", target=0.0, gain=-1.0)
    run = trainer([monitor(), Confidence(loop)], max_epochs=1)
    run.fit(Quiet(), data(TRAIN), data(HELD_OUT))
    assert loop.value() == pytest.approx(
        max(0.0, -float(run.callback_metrics["gap/margin"])), abs=1e-6
    )


def test_curves_show_the_logged_gaps_from_state_alone(tmp_path):
    ours = OverfitMonitor(figures=["curves"])
    run = trainer([ours], max_epochs=2, default_root_dir=tmp_path)
    run.fit(Quiet(), data(TRAIN), data(HELD_OUT))
    fresh = OverfitMonitor()
    fresh.load_state_dict(saved_and_loaded(ours.state_dict()))
    figure = fresh.figure("curves")
    labels = [axes.get_ylabel() for axes in figure.axes]
    drawn = [float(re.search(r"gap ([+-][\d.]+)", label).group(1)) for label in labels]
    names = ("loss", "accuracy", "ece", "entropy", "margin")
    logged = [float(run.callback_metrics[f"gap/{name}"]) for name in names]
    assert drawn == pytest.approx(logged, abs=5.1e-5)
    sides = re.findall(r"(training|validation) ([\d.]+)", texts(figure))
    entry = ours.history["val"][-1]
    assert float(sides[0][1]) == pytest.approx(entry["train_loss"], abs=5.1e-5)
    assert len(list((tmp_path / "figures").glob("val_curves*.png"))) == 2


@pytest.mark.parametrize("wrong", [0, -3, True])
def test_bad_arguments_are_refused(wrong):
    with pytest.raises(ArgumentError, match="train_data=1000"):
        OverfitMonitor(train_data=wrong)


def test_a_stream_has_no_fixed_part():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(INPUTS[0], LABELS[0])])

    with pytest.raises(ArgumentError, match="map_style"):
        trainer([monitor(train_data=5)]).fit(Quiet(), DataLoader(Stream()), data(HELD_OUT))
