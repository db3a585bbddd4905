"""Techniques for samples and classes that training would pass over."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.techniques.reweighting.ada_wac import ada_wac
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ClassifierHost

VIEWS = ["first", "second"]


class TwoViewHost(ClassifierHost):
    """The classifier on each sample, with features of it and of a shifted copy."""

    def build(self, options):
        super().build(options)
        self.first, self.second = nn.Identity(), nn.Linear(16, 16)

    def compute(self, batch):
        loss, signals = super().compute(batch)
        x = signals["inputs"]
        self.first(self.encoder(x))
        self.second(self.encoder(x.roll(1, 1)))
        return loss, signals


def _ada_wac_value(probe):
    ce = F.cross_entropy(probe.logits, probe.targets, reduction="none")
    ac = (probe.features["first"] - probe.features["second"]).square().mean(1)
    return (ac / (1 + (ce - 2 * ac).exp())).mean()


def _random(*shapes):
    generator = torch.Generator().manual_seed(0)
    make = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return tuple(t.requires_grad_() for t in make)


def _ada_wac_function():
    supervised, consistency, odds = _random(5, 5, 5)
    return lambda a, b: ada_wac(odds, a, b), (supervised, consistency)


CASES = {
    "AdaWAC": ContractCase(
        args={"strength": 2.0, "views": VIEWS},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"step_size": -1.0},
            {"replaces": "all"},
            {"views": []},
            {"num_samples": 0},
        ],
        bad_late=[{"views": ["first", "no_such_layer"]}],
        host=TwoViewHost,
        expected=_ada_wac_value,
        gradcheck=_ada_wac_function,
        logs=("reg/ada_wac", "reg/ada_wac_supervised"),
    ),
}
