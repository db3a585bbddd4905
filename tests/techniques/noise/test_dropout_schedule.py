"""Early and late dropout: rates of the official schedule, and which layers they reach."""

import pytest
import torch
from torch import nn

from lightning_reg.engine import ArgumentError
from lightning_reg.techniques.noise.dropout_schedule import DropoutSchedule, dropout_factor
from tests.engine.simple import INPUTS, Host, fit

# facebookresearch/dropout@30cc113, drop_scheduler.py: (drop_rate=0.2, epochs=4, niter_per_ep=3,
# cutoff_epoch=2). Its linear shape reaches 0 in the last early iteration, ours in the next: with
# its five intervals in place of six the numbers are the same.
OFFICIAL = {
    ("early", "constant", 6): [0.2] * 6 + [0.0] * 6,
    ("early", "linear", 5): [0.2, 0.16, 0.12, 0.08, 0.04] + [0.0] * 7,
    ("late", "constant", 6): [0.0] * 6 + [0.2] * 6,
}


class Recorder(Host):
    """Keeps the rates that its steps see."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__(dropout=dropout)
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.net[3].p)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("arguments", "rates"), OFFICIAL.items())
def test_rates_are_those_of_the_official_schedule(arguments, rates):
    mode, shape, cutoff = arguments
    technique = DropoutSchedule(0.2, mode=mode, shape=shape, cutoff=cutoff, by="step")
    module = Recorder(dropout=0.7)
    fit([technique], module=module, max_epochs=3)
    assert module.rates == pytest.approx(rates, abs=1e-12)
    assert module.net[3].p == 0.7


def test_the_cutoff_may_be_a_share_of_the_run_or_an_epoch():
    for settings in ({"cutoff": 0.5}, {"cutoff": 1, "by": "epoch"}):
        module = Recorder()
        fit([DropoutSchedule(mode="late", **settings)], module=module)
        assert module.rates == [0.0] * 4 + [0.2] * 4


def test_late_dropout_may_rise_in_a_line():
    module = Recorder()
    technique = DropoutSchedule(0.4, mode="late", shape="linear", cutoff=2, end=6, by="step")
    fit([technique], module=module)
    assert module.rates == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_after_early_dropout_training_and_evaluation_compute_the_same():
    class Compares(Recorder):
        equal = []

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                trained = self.net(INPUTS)
                self.eval()
                self.equal.append(torch.equal(trained, self.net(INPUTS)))
                self.train()
            return super().training_step(batch, batch_idx)

    module = Compares()
    fit([DropoutSchedule(mode="early", cutoff=3, by="step")], module=module)
    assert module.equal == [False] * 3 + [True] * 5


class DropPath(nn.Module):
    """As timm has it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


class Zoo(Host):
    """Every kind of layer that holds a rate."""

    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.paths = nn.ModuleList(DropPath(p) for p in (0.1, 0.2))
        self.attention = nn.MultiheadAttention(4, 1, dropout=0.3)
        self.recurrent = nn.LSTM(4, 4, num_layers=2, dropout=0.4)
        self.planes = nn.Dropout2d(0.5)
        self.custom = nn.Module()
        self.custom.attn_drop_rate = 0.6
        # A layer under the name of a rate is no rate.
        self.block = nn.Module()
        self.block.drop_prob = nn.Dropout(0.7)
        self.seen = {}

    def rates(self):
        return {
            "dropout": self.net[3].p,
            "path 0": self.paths[0].drop_prob,
            "path 1": self.paths[1].drop_prob,
            "attention": self.attention.dropout,
            "recurrent": self.recurrent.dropout,
            "planes": self.planes.p,
            "block": self.block.drop_prob.p,
            "custom": self.custom.attn_drop_rate,
        }

    def training_step(self, batch, batch_idx):
        self.seen = self.rates()
        return super().training_step(batch, batch_idx)


def test_every_layers_own_rate_is_scaled_and_comes_back():
    module = Zoo()
    own = module.rates()
    technique = DropoutSchedule(
        mode="late", shape="linear", cutoff=0.0, end=1.0, attributes=["attn_drop_rate"]
    )
    fit([technique], module=module, max_epochs=1)
    # The last of four steps is at 3/4 of the run.
    assert module.seen == pytest.approx({name: 0.75 * p for name, p in own.items()})
    assert module.rates() == own


def test_a_pattern_and_named_attributes_choose():
    module = Zoo()
    fit([DropoutSchedule(0.9, mode="late", cutoff=0.0, pattern="paths")], module=module)
    assert [k for k, p in module.seen.items() if p == 0.9] == ["path 0", "path 1"]
    fit([DropoutSchedule(0.9, mode="late", cutoff=0.0)], module=module)
    assert [k for k, p in module.seen.items() if p != 0.9] == ["custom"]


@pytest.mark.parametrize(
    ("position", "mode", "shape", "factor"),
    [
        (0.0, "early", "linear", 1.0),
        (0.125, "early", "linear", 0.75),
        (0.5, "early", "linear", 0.0),
        (0.499, "early", "constant", 1.0),
        (0.5, "early", "constant", 0.0),
        (0.499, "late", "constant", 0.0),
        (0.5, "late", "constant", 1.0),
        (0.75, "late", "linear", 0.5),
    ],
)
def test_the_factor_at_a_position(position, mode, shape, factor):
    assert dropout_factor(position, 0.5, mode, shape) == pytest.approx(factor)


def test_a_cutoff_of_zero_is_no_dropout_at_all():
    module = Recorder()
    fit([DropoutSchedule(mode="early", cutoff=0.0)], module=module)
    assert set(module.rates) == {0.0}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"pattern": "encoder"}, "finds no dropout layer"),
        ({}, "all 1 of them are 0"),
    ],
)
def test_a_module_without_anything_to_schedule_is_refused(arguments, reason):
    module = Recorder(dropout=0.0)
    with pytest.raises(ArgumentError, match=reason):
        fit([DropoutSchedule(**arguments)], module=module)
    assert module.rates == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"p": -0.1},
        {"mode": "always"},
        {"cutoff": 50},
        {"cutoff": 50, "by": "iteration"},
        {"shape": "cosine"},
        {"end": 0.5},
        {"mode": "late", "shape": "linear", "cutoff": 0.5, "end": 0.5},
        {"mode": "late", "shape": "linear", "cutoff": 5, "by": "epoch"},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match="DropoutSchedule"):
        DropoutSchedule(**arguments)
