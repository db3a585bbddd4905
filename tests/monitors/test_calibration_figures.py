"""What calibration figures show: the logged numbers, from state alone, over a resume."""

import io
import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError
from lightning_reg.engine.schedule import LinearSchedule
from lightning_reg.metrics import ReliabilityBins
from lightning_reg.metrics.uncertainty import accuracy_band
from lightning_reg.monitors import CalibrationMonitor, PostHocCalibration
from lightning_reg.monitors.calibration_drawings import (
    classwise_drawing,
    reliability_drawing,
    strength_drawing,
)
from lightning_reg.monitors.record import Record
from tests.engine.simple import INPUTS, LABELS, Confidence, Host, loader, trainer

ALL = list(CalibrationMonitor.figure_names)


class Quiet(Host):
    def validation_step(self, batch, batch_idx):
        self(batch[0])

    test_step = validation_step


def monitor(figures=(), **kwargs):
    return CalibrationMonitor(figures=list(figures), **kwargs)


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [axes.get_title(), *(text.get_text() for text in axes.texts)]
        legend = axes.get_legend()
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    if figure._suptitle:
        found.append(figure._suptitle.get_text())
    return "\n".join(found)


def drawn(figure, name):
    return float(re.search(rf"{name} ([\d.e+-]+)", texts(figure)).group(1))


def pixels(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba")
    return buffer.getvalue()


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    ours = monitor(ALL, metrics=["smece", "aurc", "classwise_ece"], num_classes=4)
    technique = Confidence(LinearSchedule(0.0, 0.2, end=2, by="epoch"))
    run = trainer([technique, ours, PostHocCalibration()], max_epochs=3, default_root_dir=folder)
    run.fit(Quiet(), loader(), loader())
    return ours, run


@pytest.mark.parametrize(
    ("figure", "label", "key"),
    [
        ("reliability", "ECE", "ece"),
        ("classwise", "mean ECE", "classwise_ece"),
        ("smooth", "smECE", "smece"),
        ("risk_coverage", "AURC", "aurc"),
    ],
)
def test_the_drawn_number_is_the_logged_one(fitted, figure, label, key):
    ours, run = fitted
    logged = float(run.callback_metrics[f"val/{key}"])
    assert drawn(ours.figure(figure), label) == pytest.approx(logged, abs=5.1e-5)
    assert logged > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_figures_are_the_same_after_loading_a_state_without_samples(fitted, name):
    ours, _ = fitted
    fresh = monitor(ALL, num_classes=4)
    fresh.load_state_dict(saved_and_loaded(ours.state_dict()))
    assert pixels(fresh.figure(name)) == pixels(ours.figure(name))


def test_each_asked_figure_was_written_after_each_epoch(fitted):
    _, run = fitted
    names = [p.name for p in run_folder(run).glob("*.png")]
    steps = {
        "val_" + name: sorted(n for n in names if n.startswith(f"val_{name}_")) for name in ALL
    }
    assert {key: len(found) for key, found in steps.items()} == dict.fromkeys(steps, 3)


def run_folder(run):
    from pathlib import Path

    return Path(run.default_root_dir) / "figures"


def test_the_calibrated_side_is_that_of_the_callback(fitted):
    ours, run = fitted
    found = texts(ours.figure("temperature"))
    errors = [float(x) for x in re.findall(r"ECE ([\d.]+)", found)]
    wanted = [float(run.callback_metrics[f"val/ece{part}"]) for part in ("", "_calibrated")]
    assert errors == pytest.approx(wanted, abs=5.1e-5)
    calibrator = next(c for c in run.callbacks if isinstance(c, PostHocCalibration)).calibrator
    assert drawn(ours.figure("temperature"), "T =") == pytest.approx(
        calibrator.temperature, abs=5.1e-5
    )


def test_history_holds_each_epochs_values_and_strengths(fitted):
    ours, _ = fitted
    entries = ours.history["val"]
    assert [e["epoch"] for e in entries] == [0, 1, 2]
    assert [e["step"] for e in entries] == [4, 8, 12]
    assert [e["strength/confidence"] for e in entries] == pytest.approx([0.0, 0.1, 0.2])
    assert entries[-1]["ece"] == ours.results["val/ece"]


def test_history_goes_on_after_a_resume(tmp_path):
    def fit(epochs, **kwargs):
        ours, save = monitor(), ModelCheckpoint(tmp_path, save_last=True)
        run = trainer([ours, save], max_epochs=epochs, enable_checkpointing=True)
        run.fit(Quiet(), loader(), loader(), **kwargs)
        return ours

    straight, first = fit(4), fit(2)
    resumed = fit(4, ckpt_path=tmp_path / "last-v1.ckpt")
    assert len(first.history["val"]) == 2
    assert resumed.history == straight.history
    assert resumed.results == straight.results


def test_standalone_validation_and_the_sanity_check_leave_no_history():
    ours = monitor()
    run = trainer([ours], max_epochs=1, num_sanity_val_steps=2)
    run.fit(Quiet(), loader(), loader())
    run.validate(Quiet(), loader(), verbose=False)
    run.test(Quiet(), loader(), verbose=False)
    assert {tag: len(entries) for tag, entries in ours.history.items()} == {"val": 1}
    assert set(ours.record.states) == {"val", "test"}


def test_a_validation_that_is_run_again_after_a_resume_stands_once_in_the_history():
    record = Record()
    for step, value in ((4, 0.3), (8, 0.2), (8, 0.1)):
        record.remember("val", {"epoch": step // 4 - 1, "step": step, "ece": value})
    assert record.curve("val", "ece") == ([0, 1], [0.3, 0.1])


def test_every_n_epochs_counts_epochs_of_the_fit(tmp_path):
    ours = monitor(["reliability"], every_n_epochs=2)
    run = trainer([ours], max_epochs=4, default_root_dir=tmp_path)
    run.fit(Quiet(), loader(), loader())
    names = sorted(p.name for p in run_folder(run).glob("*.png"))
    assert names == [f"val_reliability_step_{step:08d}.png" for step in (4, 12)]


def test_the_worst_classes_are_shown_where_there_are_many():
    counts = torch.full((12, 5), 10)
    confidence = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).expand(12, 5) * counts
    off = torch.arange(12) / 200
    correct = confidence + off[:, None] * counts
    found = classwise_drawing(ReliabilityBins(counts, confidence, correct), title="val")
    assert found.numbers["shown"] == list(range(11, 2, -1))
    shown = re.findall(r"class (\d+): ECE ([\d.]+)", texts(found.figure))
    assert {int(k): float(v) for k, v in shown} == pytest.approx(
        {k: k / 200 for k in range(3, 12)}, abs=5.1e-5
    )
    assert "the worst 9 of 12 classes" in texts(found.figure)


def test_figures_without_what_they_show_are_refused():
    with pytest.raises(ArgumentError, match="num_classes=10"):
        monitor(["classwise"])
    with pytest.raises(ArgumentError, match="num_classes=10"):
        monitor(metrics=["classwise_ece"])
    with pytest.raises(ArgumentError, match="PostHocCalibration"):
        trainer([monitor(["temperature"])]).validate(Quiet(), loader(), verbose=False)
    with pytest.raises(ArgumentError, match="there is none among the callbacks"):
        trainer([monitor(["strength"])]).validate(Quiet(), loader(), verbose=False)
    with pytest.raises(ArgumentError, match="it has counted nothing"):
        monitor().figure("reliability")
    with pytest.raises(ArgumentError, match="`figures` must be a list"):
        monitor().figure("pie")


def test_metrics_that_count_alike_are_updated_once(monkeypatch):
    from lightning_reg.metrics.fine_histogram import OrderMetric

    calls = []
    original = OrderMetric.accumulate
    monkeypatch.setattr(
        OrderMetric, "accumulate", lambda self, rows: (calls.append(1), original(self, rows))
    )
    trainer([monitor(metrics=["smece", "aurc"])]).validate(Quiet(), loader(64), verbose=False)
    # The sanity check does not run in a standalone validation: one batch of 64.
    assert len(calls) == 1


def test_intervals_stand_at_the_accuracy_of_their_bins():
    bins = ReliabilityBins(
        torch.tensor([0, 10, 40]), torch.tensor([0.0, 5.0, 36.0]), torch.tensor([0.0, 3.0, 38.0])
    )
    axes = reliability_drawing(bins, band=accuracy_band(bins)).figure.axes[0]
    segments = [line for c in axes.collections for line in c.get_segments()]
    ends = sorted((float(x), float(low), float(high)) for (x, low), (_, high) in segments)
    # scipy.stats.binomtest(3, 10).proportion_ci() and (38, 40).
    assert [x for x, _, _ in ends] == pytest.approx([0.5, 5 / 6])
    assert ends[0][1:] == pytest.approx((0.06674, 0.65245), abs=1e-4)
    assert ends[1][1:] == pytest.approx((0.83080, 0.99388), abs=1e-4)


def test_an_empty_diagram_is_drawn():
    bins = ReliabilityBins(torch.zeros(5, dtype=torch.int64), torch.zeros(5), torch.zeros(5))
    found = reliability_drawing(bins, band=accuracy_band(bins), title="nothing")
    assert "n = 0" in texts(found.figure)
    pixels(found.figure)


def test_of_many_techniques_those_that_moved_most_are_shown():
    history = [
        {"epoch": e, "step": e, "ece": 0.1, **{f"strength/t{k}": 1.0 + k * e for k in range(7)}}
        for e in range(3)
    ]
    found = strength_drawing(history, "strength/", "val")
    assert list(found.numbers) == ["t2", "t3", "t4", "t5", "t6"]
    assert found.numbers["t3"]["strength"] == [1.0, 4.0, 7.0]
    assert "the 5 of 7 techniques" in texts(found.figure)


def test_several_dataloaders_have_their_own_figures(tmp_path):
    class Several(Quiet):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    data = [DataLoader(TensorDataset(INPUTS[p], LABELS[p]), 16) for p in (slice(40), slice(40, 64))]
    ours = monitor(["reliability"])
    run = trainer([ours], max_epochs=1, default_root_dir=tmp_path)
    run.fit(Several(), loader(), data)
    for index, size in enumerate((40, 24)):
        tag = f"val/dataloader_idx_{index}"
        assert f"n = {size}" in texts(ours.figure("reliability", tag))
        assert len(ours.history[tag]) == 1
    assert len(list(run_folder(run).glob("*.png"))) == 2
