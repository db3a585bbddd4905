"""Techniques that compare two passes over a batch."""

import torch

from lightning_reg.techniques.noise.entropy_gated_r_drop import entropy_gated_r_drop
from lightning_reg.techniques.noise.r_drop import r_drop
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ClassifierHost


class TwoFacedHost(ClassifierHost):
    """A network that is another one in a second pass.

    In place of dropout, whose masks no two ranks and no two micro-batches share: this host answers
    the same on all of them, so that they can be compared with a joint batch.
    """

    def build(self, options):
        super().build(options)
        self.seeds = []

    def forward(self, x):
        return self.answer(x, torch.initial_seed())

    def answer(self, x, seed):
        self.seeds = self.seeds or [seed]
        scale = 1.0 if seed == self.seeds[0] else 0.3
        return self.head(self.dropout(self.encoder(x)) * scale)

    def second(self, x):
        return self.answer(x, self.seeds[0] + 1)


def _plain(probe):
    return r_drop(probe.logits, probe.module.second(probe.inputs)).mean()


def _gated(probe):
    return entropy_gated_r_drop(probe.logits, probe.module.second(probe.inputs)).mean()


def _pair(function):
    generator = torch.Generator().manual_seed(0)
    first, second = (
        3 * torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    # The gate reads the first and takes no gradient.
    return function, (first, second.requires_grad_())


CASES = {
    "RDrop": ContractCase(
        args={"strength": 2.0},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"ignore_index": 1.5}, {"class_dim": "last"}],
        host=TwoFacedHost,
        expected=_plain,
        gradcheck=lambda: _pair(r_drop),
    ),
    "EntropyGatedRDrop": ContractCase(
        args={"strength": 2.0, "gated": "all"},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"gated": "none"}],
        host=TwoFacedHost,
        expected=_gated,
        gradcheck=lambda: _pair(entropy_gated_r_drop),
        logs=("reg/entropy_gated_r_drop", "reg/entropy_gated_r_drop_gate"),
    ),
}
