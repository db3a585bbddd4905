"""The main job: what it trains, what it shows, and what it says to a wrong argument."""

import csv
import html.parser
import math
import os
from contextlib import nullcontext
from dataclasses import replace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_reg
from lightning_reg.cli.compare import make_parser, read_settings
from lightning_reg.cli.main import main
from lightning_reg.compare import launch
from lightning_reg.compare.data import SmallData, corrupt, load_digits
from lightning_reg.compare.run import Job, Run, train
from lightning_reg.compare.settings import BASELINE, DEFAULT_TECHNIQUES, Settings
from lightning_reg.compare.specs import find_class, parse_arm, parse_class
from lightning_reg.compare.statistics import summarize, verdict
from lightning_reg.engine import ArgumentError, IndexedDataset, RegularizationError
from lightning_reg.engine.schedule import LinearSchedule
from tests.engine.simple import INPUTS, LABELS, Confidence

# ---------------------------------------------------------------------- specs


def test_a_spec_holds_names_and_arguments():
    first, second = parse_arm("SAM(rho=0.1, adaptive=True)+ConfidencePenalty")
    technique = first.build()
    assert type(technique) is lightning_reg.SAM
    assert technique.strength == 0.1
    assert technique.adaptive is True
    assert second.name == "ConfidencePenalty"


def test_a_spec_may_hold_a_schedule():
    (spec,) = parse_arm("ConfidencePenalty(strength=LinearSchedule(initial=0.0, final=0.5))")
    schedule = spec.build().strength
    assert isinstance(schedule, LinearSchedule)
    assert schedule.value(progress=1.0) == 0.5


def test_a_spec_may_be_an_import_path():
    (spec,) = parse_arm("tests.engine.simple.Confidence(strength=0.5)")
    technique = spec.build()
    assert isinstance(technique, Confidence)
    assert technique.strength == 0.5


def test_what_the_run_knows_fills_parameters_of_that_name_only():
    class Needs:
        def __init__(self, num_classes, other=1):
            self.num_classes, self.other = num_classes, other

    globals()["Needs"] = Needs
    spec = parse_class(f"{__name__}.Needs(other=2)")
    made = spec.build({"num_classes": 10, "num_samples": 5})
    assert (made.num_classes, made.other) == (10, 2)
    assert (
        parse_class(f"{__name__}.Needs(num_classes=3)").build({"num_classes": 10}).num_classes == 3
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SAMM", "SAM"),
        ("EarlyLearnin", "EarlyLearning"),
        ("SAM(0.1)", "by name"),
        ("SAM(rho=", "cannot read"),
        ("SAM(rho=x)", "no number"),
        ("SAM-Mixup", "no list of techniques"),
        ("no.such.Thing", "cannot import"),
        ("lightning_reg.engine.Nothing", "cannot import"),
        ("CalibrationError", "no callback"),
        ("__import__('os')", "by name"),
        ("__import__", "no technique"),
    ],
)
def test_a_wrong_spec_is_named(text, message):
    with pytest.raises(ArgumentError, match=message):
        parse_arm(text)


def test_a_wrong_argument_shows_the_right_ones():
    with pytest.raises(ArgumentError, match=r"radius.*SAM\(rho"):
        parse_arm("SAM(radius=1.0)")[0].build()


# ---------------------------------------------------------------------- data


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_exactly_that_share_of_labels_is_wrong(share):
    labels = torch.arange(1000) % 10
    noisy = corrupt(labels, share, 10, torch.Generator().manual_seed(0))
    assert int((noisy != labels).sum()) == round(1000 * share)
    assert noisy.min() >= 0
    assert noisy.max() <= 9


def test_held_out_samples_are_clean_and_never_trained_on():
    data = SmallData("digits", label_noise=0.5, seed=3)
    images, labels = load_digits()
    clean = {x.numpy().tobytes(): int(y) for x, y in zip(images, labels, strict=True)}
    held_out = {x.numpy().tobytes(): int(y) for x, y in data.held_out}
    assert all(clean[image] == label for image, label in held_out.items())
    assert not set(held_out) & {x.numpy().tobytes() for x, _ in data.training}
    assert len(data.held_out) == 599
    assert len(data.training) == 1198


def test_the_split_is_the_same_for_all_seeds_and_the_noise_is_not():
    one, other = SmallData("digits", label_noise=0.4), SmallData("digits", label_noise=0.4, seed=1)
    assert torch.equal(one.held_out.tensors[0], other.held_out.tensors[0])
    assert not torch.equal(one.training.tensors[1], other.training.tensors[1])
    again = SmallData("digits", label_noise=0.4, seed=1)
    assert torch.equal(again.training.tensors[1], other.training.tensors[1])


def test_a_fraction_of_the_training_set():
    data = SmallData("digits", train_fraction=0.1, indexed=True)
    assert data.num_samples == len(data.training) == 120
    assert isinstance(data.training, IndexedDataset)


def test_mnist5k_is_read():
    data = SmallData("mnist5k", train_fraction=0.01)
    assert data.num_features == 784
    assert data.num_classes == 10
    assert len(data.held_out) == 1666


def test_unknown_data_is_named():
    with pytest.raises(ArgumentError, match="digits, mnist5k"):
        SmallData("cifar")


# ---------------------------------------------------------------------- statistics


def test_a_difference_is_shown_only_if_its_interval_leaves_out_zero():
    # Mean 1, standard error 0.707, t(4) = 2.776: the interval is 1 +- 1.96.
    assert verdict([-1.0, 0.0, 1.0, 2.0, 3.0], [0.0] * 5, 1) == "no difference"
    # Standard error 0.177: the interval is 1 +- 0.49.
    assert verdict([0.5, 0.75, 1.0, 1.25, 1.5], [0.0] * 5, 1) == "better"
    assert verdict([0.5, 0.75, 1.0, 1.25, 1.5], [0.0] * 5, -1) == "worse"
    assert verdict([-0.5, -0.75, -1.0, -1.25, -1.5], [0.0] * 5, 0) == "lower"


def test_equal_runs_show_no_difference_and_one_seed_shows_nothing():
    assert verdict([1.0, 2.0], [1.0, 2.0], 1) == "no difference"
    assert verdict([2.0], [1.0], 1) == ""


def test_seeds_are_compared_in_pairs():
    # The seeds differ by far more than the technique does, and by the same in both arms.
    assert verdict([10.1, 20.11, 30.09], [10.0, 20.0, 30.0], 1) == "better"


def made_run(arm, seed, accuracy, step_ms):
    values = {"accuracy": accuracy, "nll": 1.0, "ece": 0.1, "entropy": 1.0}
    return Run(arm, seed, values, [values], step_ms, ([1], [0.5], [1.0]), Settings())


def test_rows_hold_mean_spread_and_the_ratio_to_the_same_seed():
    runs = [
        made_run(BASELINE, 0, 0.5, 1.0),
        made_run(BASELINE, 1, 0.7, 4.0),
        made_run("SAM", 1, 0.75, 8.0),
        made_run("SAM", 0, 0.8, 2.0),
    ]
    base, sam = summarize(runs)
    assert base.arm == BASELINE
    assert base.cells["accuracy"].mean == pytest.approx(0.6)
    assert base.cells["accuracy"].spread == pytest.approx(0.02**0.5)
    assert base.cells["accuracy"].verdict == ""
    assert sam.cells["accuracy"].mean == pytest.approx(0.775)
    # Two pairs, 0.3 and 0.05 apart, cannot show that the mean is not zero.
    assert sam.cells["accuracy"].verdict == "no difference"
    assert sam.cells["nll"].verdict == "no difference"
    assert (sam.time.mean, sam.time.spread) == (2.0, 0.0)
    assert math.isnan(summarize(runs[:1])[0].cells["accuracy"].spread)


# ---------------------------------------------------------------------- trainings

SHORT = Settings(techniques=("ConfidencePenalty",), seeds=1, epochs=1, train_fraction=0.2)


def test_a_technique_at_strength_zero_trains_what_the_baseline_trains():
    plain = train(Job(SHORT, BASELINE, 0))
    neutral = train(Job(SHORT, "ConfidencePenalty(strength=0.0)", 0))
    other = train(Job(SHORT, "ConfidencePenalty(strength=5.0)", 0))
    assert neutral.values == plain.values
    assert neutral.bins == plain.bins
    assert other.values != plain.values


def test_a_run_holds_the_held_out_values_of_every_epoch():
    run = train(Job(Settings(epochs=2, train_fraction=0.2), BASELINE, 0))
    assert len(run.curves) == 2
    assert run.values == run.curves[-1]
    counts, confidence, correct = run.bins
    assert sum(counts) == 599
    assert run.values["accuracy"] == pytest.approx(sum(correct) / 599)
    gaps = sum(abs(a - c) for a, c in zip(confidence, correct, strict=True)) / 599
    assert run.values["ece"] == pytest.approx(gaps)
    assert run.step_ms > 0


def test_the_environment_and_threads_are_left_as_they_were():
    before, threads = dict(os.environ), torch.get_num_threads()
    train(Job(SHORT, BASELINE, 0))
    assert dict(os.environ) == before
    assert torch.get_num_threads() == threads


def test_arms_of_one_seed_are_trained_side_by_side():
    order = [(j.seed, j.arm) for j in launch.jobs(Settings(techniques=("A", "B", "A"), seeds=2))]
    assert order == [(s, a) for s in (0, 1) for a in (BASELINE, "A", "B")]


def test_processes_train_together_and_one_of_them_reports(ranks, monkeypatch):
    # The shared processes in place of new ones, which take seconds to start.
    monkeypatch.setattr(launch, "RankPair", lambda size, timeout: nullcontext(ranks))
    settings = Settings(
        techniques=("EarlyLearning",), seeds=1, epochs=1, devices=2, strategy="ddp_reg"
    )
    epochs = []
    base, technique = launch.run_all(settings, epochs.append)
    assert epochs == [1, 1]
    assert sum(base.bins[0]) == sum(technique.bins[0]) == 599
    assert base.values != technique.values
    single = train(Job(replace(settings, devices=1, strategy="auto"), BASELINE, 0))
    # Both processes together see the batches of one, in another order.
    assert base.values["nll"] == pytest.approx(single.values["nll"], rel=0.1)


# ---------------------------------------------------------------------- own module and data


class OwnNet(L.LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return {"logits": self(batch[0])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class OwnData(L.LightningDataModule):
    def __init__(self, indexed=False):
        super().__init__()
        self.indexed = indexed
        self.data = TensorDataset(INPUTS, LABELS)

    def train_dataloader(self):
        return DataLoader(IndexedDataset(self.data) if self.indexed else self.data, batch_size=16)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=64)


def own(**kwargs):
    names = {"module": f"{__name__}.OwnNet(lr=0.5)", "datamodule": f"{__name__}.OwnData"}
    return Settings(**{**names, "label_noise": 0.0, "epochs": 1, "seeds": 1, **kwargs})


def test_own_module_and_data_by_import_path():
    run = train(Job(own(), "ConfidencePenalty", 0))
    assert sum(run.bins[0]) == 64


def test_own_indexed_data_serves_the_baseline_too():
    indexed = own(datamodule=f"{__name__}.OwnData(indexed=True)")
    assert train(Job(indexed, BASELINE, 0)).values == train(Job(own(), BASELINE, 0)).values


def test_own_data_without_validation_is_named():
    class NoValidation(OwnData):
        def val_dataloader(self):
            return []

    globals()["NoValidation"] = NoValidation
    with pytest.raises(RegularizationError, match="val_dataloader"):
        train(Job(own(datamodule=f"{__name__}.NoValidation"), BASELINE, 0))


# ---------------------------------------------------------------------- the command


def settings_of(*arguments):
    return read_settings(make_parser().parse_args(list(arguments)))


def test_defaults_are_noisy_digits_over_several_seeds():
    settings = settings_of()
    assert settings.techniques == DEFAULT_TECHNIQUES
    assert (settings.data, settings.label_noise, settings.train_fraction) == ("digits", 0.4, 1.0)


def test_fast_is_one_seed_and_one_epoch():
    settings = settings_of("--fast")
    assert (settings.seeds, settings.epochs) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--label-noise", "1.5"], "--label-noise 0.4"),
        (["--train-fraction", "0"], "--train-fraction 0.1"),
        (["--seeds", "0"], "--seeds 5"),
        (["--devices", "3"], "--batch-size 63"),
        (["--module", "my.Net"], "--datamodule"),
        (["--devices", "2", "--accelerator", "cuda"], "--accelerator cpu"),
        (["--techniques", "SAMM"], "mean SAM"),
        (["--techniques", "SAM(rho=-1)"], "SAM(rho=0.05)"),
        (["--techniques", "SAM(radius=1)"], "radius"),
        (["--data", "cifar", "--fast"], "--data digits"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, cure, capsys, tmp_path):
    assert main(["compare", *arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert cure in error
    assert "Traceback" not in error


def test_noise_is_not_for_own_data():
    arguments = ["--module", "my.Net", "--datamodule", "my.Data", "--label-noise", "0.4"]
    with pytest.raises(RegularizationError, match="not your own"):
        settings_of(*arguments)


class Images(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.links = [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.sources.append(values["src"])
        self.links += [values[key] for key in ("href",) if key in values]


def test_the_command_prints_a_table_and_writes_the_report(tmp_path, capsys):
    arguments = ["compare", "--fast", "--techniques", "ConfidencePenalty", "SAM(rho=0.1)"]
    assert main([*arguments, "--output", str(tmp_path), "--train-fraction", "0.2"]) == 0
    printed = capsys.readouterr().out
    for text in ("no technique", "SAM(rho=0.1)", "ECE %", "step time", "One seed"):
        assert text in printed
    page = (tmp_path / "report.html").read_text()
    parser = Images()
    parser.feed(page)
    assert len(parser.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in parser.sources)
    assert parser.links == []
    assert "lightning-reg compare --techniques ConfidencePenalty" in page
    with (tmp_path / "runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["technique"] for line in lines] == [BASELINE, "ConfidencePenalty", "SAM(rho=0.1)"]
    shown = 100 * float(lines[0]["accuracy"])
    assert f"{shown:.1f}" in printed
    assert f"{shown:.1f}" in page
    with (tmp_path / "reliability.csv").open() as file:
        assert sum(int(r["count"]) for r in csv.DictReader(file)) == 3 * 599
    with (tmp_path / "curves.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3


def test_what_is_missing_is_named(monkeypatch, capsys):
    from lightning_reg.compare import settings as module

    def missing(name, extra, what):
        raise ModuleNotFoundError(f'{what} needs {name}. Try: pip install "lightning_reg[{extra}]"')

    monkeypatch.setattr(module, "require", missing)
    assert main(["compare", "--fast"]) == 2
    assert 'pip install "lightning_reg[demo]"' in capsys.readouterr().err


def test_public_names_are_found():
    assert find_class("SAM") is lightning_reg.SAM
