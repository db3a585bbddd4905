"""Losses on two views of each sample."""

import torch
from torch import nn

from lightning_reg.techniques.contrastive.decoupled_contrastive import decoupled_contrastive
from lightning_reg.techniques.contrastive.vicreg import vicreg
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ClassifierHost

VIEWS = ["first", "second"]


class TwoViewHost(ClassifierHost):
    """The classifier, which also embeds each sample and a shifted copy of it."""

    def build(self, options):
        """Names for the embeddings."""
        super().build(options)
        self.first, self.second = nn.Identity(), nn.Linear(16, 16)

    def compute(self, batch):
        """Cross-entropy; the embeddings are there to be captured."""
        loss, signals = super().compute(batch)
        x = signals["inputs"]
        self.first(self.encoder(x))
        self.second(self.encoder(x.roll(1, 1)))
        return loss, signals


def _views():
    generator = torch.Generator().manual_seed(0)
    make = [torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2)]
    return tuple(z.requires_grad_() for z in make)


CASES = {
    "VICReg": ContractCase(
        args={"strength": 0.1, "views": VIEWS},
        neutral={"strength": 0.0},
        bad=[{"invariance": -1.0}, {"gamma": 0.0}, {"views": []}, {"views": ["z", "z"]}],
        bad_late=[{"views": ["first", "no_such_layer"]}],
        host=TwoViewHost,
        expected=lambda p: vicreg(p.features["first"], p.features["second"]),
        gradcheck=lambda: (vicreg, _views()),
    ),
    "DecoupledContrastive": ContractCase(
        args={"strength": 0.1, "sigma": 0.5, "views": VIEWS},
        neutral={"strength": 0.0},
        bad=[{"temperature": 0.0}, {"sigma": -1.0}, {"views": ["a", "b", "c"]}],
        bad_late=[{"views": "no_such_layer"}],
        host=TwoViewHost,
        expected=lambda p: decoupled_contrastive(
            p.features["first"], p.features["second"], 0.1, 0.5
        ),
        gradcheck=lambda: (lambda a, b: decoupled_contrastive(a, b, 0.1, 0.5), _views()),
    ),
}
