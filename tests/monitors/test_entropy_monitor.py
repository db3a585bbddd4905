"""Entropies against a recomputation; attention from layers, outputs and under a mask."""

import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.engine import ArgumentError, MissingSignalError
from lightning_reg.metrics import EntropyHistogram
from lightning_reg.monitors import CalibrationMonitor, EntropyMonitor
from lightning_reg.monitors.entropy_drawings import (
    attention_drawing,
    classes_drawing,
    split_drawing,
)
from lightning_reg.testing import rank_trainer
from tests.engine.simple import INPUTS, LABELS, Host, loader, trainer
from tests.monitors.test_calibration_figures import pixels, saved_and_loaded, texts


class Quiet(Host):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


def monitor(**kwargs):
    return EntropyMonitor(**{"figures": False, **kwargs})


def chances(module, x=INPUTS):
    module.eval()
    with torch.no_grad():
        return module(x).double().softmax(1)


def entropy(p):
    return -(p * p.log()).sum(-1)


def test_predictive_and_marginal_entropy_and_their_separation_of_errors():
    module, run = Quiet(), trainer([monitor(num_classes=4)])
    run.validate(module, loader(24), verbose=False)
    p = chances(module)
    each, wrong = entropy(p), p.argmax(1) != LABELS
    pairs = each[wrong][:, None] - each[~wrong][None, :]
    separation = float((pairs > 0).double().mean())
    found = {key: float(value) for key, value in run.callback_metrics.items()}
    assert found == pytest.approx(
        {
            "val/entropy": float(each.mean()),
            "val/marginal_entropy": float(entropy(p.mean(0))),
            # 200 bins of entropy: pairs within one count a half.
            "val/entropy_separation": pytest.approx(separation, abs=0.02),
        },
        abs=1e-6,
    )


def test_stands_beside_a_calibration_monitor_that_logs_the_same_entropy():
    module = Quiet()
    one, other = monitor(), CalibrationMonitor(figures=False)
    run = trainer([one, other], max_epochs=1)
    run.fit(module, loader(), loader())
    logged = float(run.callback_metrics["val/entropy"])
    assert one.results["val/entropy"] == other.results["val/entropy"]
    assert logged == pytest.approx(one.results["val/entropy"], rel=1e-6)


class Attentive(Host):
    """Two layers of attention over 4 tokens of 2 features."""

    def __init__(self, returns="layer"):
        super().__init__()
        torch.manual_seed(1)
        self.returns = returns
        self.first = nn.MultiheadAttention(2, 2, batch_first=True)
        self.second = nn.MultiheadAttention(2, 2, batch_first=True)
        self.head = nn.Linear(2, 4)

    def attend(self, layer, x):
        return layer(x, x, x, need_weights=True, average_attn_weights=False)

    def forward(self, x):
        x = x.view(-1, 4, 2)
        x, one = self.attend(self.first, x)
        x, two = self.attend(self.second, x)
        return self.head(x.mean(1)), [one, two]

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0])[0], batch[1])

    def validation_step(self, batch, batch_idx):
        logits, attentions = self(batch[0])
        return {"logits": logits, "attentions": attentions}


def attention_of(module, x=INPUTS):
    module.eval()
    with torch.no_grad():
        return [entropy(a.double()).mean((0, 2)) for a in module(x)[1]]


@pytest.mark.parametrize(
    "names", [["first", "second"], ["outputs.attentions.0", "outputs.attentions.1"]]
)
def test_attention_entropy_of_each_layer_and_head(names):
    module, ours = Attentive(), monitor(attention=names, num_heads=2)
    run = trainer([ours])
    run.validate(module, loader(24), verbose=False)
    heads = torch.stack(attention_of(module))
    assert float(run.callback_metrics["val/attention_entropy"]) == pytest.approx(
        float(heads.mean()), abs=1e-6
    )
    assert float(run.callback_metrics["val/attention_entropy_min"]) == pytest.approx(
        float(heads.min()), abs=1e-6
    )
    written = re.findall(r"^\d\.\d\d$", texts(ours.figure("attention")), re.M)
    assert [float(x) for x in written] == pytest.approx(heads.flatten().tolist(), abs=5.1e-3)


def test_padding_is_neither_looked_at_nor_looks():
    rows = [
        {"x": x, "y": y, "real": torch.tensor([1, 1, 0, 0])}
        for x, y in zip(INPUTS, LABELS, strict=True)
    ]
    ours = monitor(
        attention=["outputs.attentions.0"],
        num_heads=2,
        attention_mask=lambda step: _both(step.batch["real"]),
    )
    named = monitor(attention=["outputs.attentions.0"], num_heads=2, attention_mask="batch.real")

    class Half(Attentive):
        """Every token looks at the first two alike."""

        def validation_step(self, batch, batch_idx):
            weights = torch.zeros(len(batch["x"]), 2, 4, 4)
            weights[..., :2] = 0.5
            return {"logits": self(batch["x"])[0], "attentions": [weights]}

    run = trainer([ours])
    run.validate(Half(), DataLoader(rows, 16), verbose=False)
    assert ours.results["val/attention_entropy"] == pytest.approx(math.log(2))
    run = trainer([named])
    run.validate(Half(), DataLoader(rows, 16), verbose=False)
    assert named.results == ours.results
    assert int(named.record.states["val"]["attention_entropy"]["count"][0, 0]) == 64 * 2


def _both(real):
    real = real != 0
    return real[:, None, None, :] & real[:, None, :, None]


def test_attention_that_is_not_there_is_named():
    ours = monitor(attention=["head"], num_heads=2)
    with pytest.raises(ArgumentError, match=r"needs float attention \(B, 2, T, S\)"):
        trainer([ours]).validate(Attentive(), loader(), verbose=False)
    ours = monitor(attention=["first.out_proj"], num_heads=2)
    with pytest.raises(MissingSignalError, match="called 0 times"):
        trainer([ours]).validate(Attentive(), loader(), verbose=False)


def validate_on_ranks(size):
    data = DataLoader(TensorDataset(INPUTS[:size], LABELS[:size]), batch_size=8)
    module, ours = Attentive(), monitor(num_classes=4, attention=["first", "second"], num_heads=2)
    run = rank_trainer(callbacks=[ours], max_epochs=1)
    run.validate(module, data, verbose=False)
    return ours.results, float(torch.stack(attention_of(module, INPUTS[:size])).mean())


def test_two_ranks_equal_one_process_and_repeats_count_once(ranks):
    ours = monitor(num_classes=4, attention=["first", "second"], num_heads=2)
    data = DataLoader(TensorDataset(INPUTS[:61], LABELS[:61]), batch_size=61)
    trainer([ours]).validate(Attentive(), data, verbose=False)
    for found, attention in ranks.run(validate_on_ranks, 61):
        assert found == pytest.approx(ours.results, abs=1e-9)
        assert found["val/attention_entropy"] == pytest.approx(attention, abs=1e-9)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    ours = EntropyMonitor(
        num_classes=4,
        attention=["first", "second"],
        num_heads=2,
        figures=["split", "classes", "attention", "drift"],
    )
    folder = tmp_path_factory.mktemp("fitted")
    run = trainer([ours], max_epochs=2, default_root_dir=folder)
    run.fit(Attentive(), loader(), loader())
    return ours, run, folder


@pytest.mark.parametrize("name", ["split", "classes", "attention", "drift"])
def test_figures_come_from_the_state_alone(fitted, name):
    ours, _, folder = fitted
    fresh = monitor(num_classes=4, attention=["first", "second"], num_heads=2)
    fresh.load_state_dict(saved_and_loaded(ours.state_dict()))
    assert pixels(fresh.figure(name)) == pixels(ours.figure(name))
    assert len(list((folder / "figures").glob(f"val_{name}_*.png"))) == 2


def test_drawn_numbers_are_the_logged_ones(fitted):
    ours, run, _ = fitted
    logged = {key[4:]: float(value) for key, value in run.callback_metrics.items()}
    found = re.search(r"separation ([\d.]+)", texts(ours.figure("split"))).group(1)
    assert float(found) == pytest.approx(logged["entropy_separation"], abs=5.1e-5)
    found = re.search(r"mean ([\d.]+)", texts(ours.figure("attention"))).group(1)
    assert float(found) == pytest.approx(logged["attention_entropy"], abs=5.1e-5)
    latest = re.findall(r"latest ([\d.]+)", texts(ours.figure("drift")))
    names = ("entropy", "entropy_separation", "marginal_entropy", "attention_entropy")
    assert [float(x) for x in latest] == pytest.approx([logged[n] for n in names], abs=5.1e-5)


def test_bars_are_the_mean_entropies_of_the_classes(fitted):
    ours, _, _ = fitted
    metrics = ours.build_metrics()
    from lightning_reg.monitors.record import with_states

    with_states(metrics, ours.record.states["val"])
    bars = [patch.get_height() for patch in ours.figure("classes").axes[0].patches]
    assert bars == pytest.approx(metrics["class_entropy"].value().tolist())
    weights = torch.bincount(LABELS).double() / 64
    assert float((torch.tensor(bars) * weights).sum()) == pytest.approx(
        ours.results["val/entropy"], abs=1e-9
    )


def test_sparse_and_empty_states_are_drawn():
    empty = torch.zeros(20, dtype=torch.int64)
    pixels(split_drawing(EntropyHistogram(empty, empty), float("nan"), "val").figure)
    entropies = torch.linspace(0, 3, 100).double()
    counts = torch.ones(100, dtype=torch.int64)
    many = classes_drawing(entropies, counts, "val").figure
    assert len(many.axes[0].patches) == 30
    assert "30 of 100" in many.axes[0].get_xlabel()
    few = classes_drawing(torch.tensor([0.1, float("nan")]), torch.tensor([3, 0]), "val")
    assert len(few.figure.axes[0].patches) == 1
    pixels(attention_drawing(torch.full((2, 3), float("nan")), ["a", "b"], "val").figure)


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        ({"attention": "first"}, "attention="),
        ({"attention": ["first"]}, "num_heads=8"),
        ({"attention_mask": "mask"}, r"batch\.attention_mask"),
        ({"figures": ["classes"]}, "num_classes=10"),
        ({"figures": ["attention"]}, "num_heads=8"),
        ({"figures": ["pie"]}, "split"),
        ({"num_classes": 1}, "num_classes=10"),
    ],
)
def test_bad_arguments_are_refused(arguments, cure):
    with pytest.raises(ArgumentError, match=cure):
        EntropyMonitor(**arguments)
