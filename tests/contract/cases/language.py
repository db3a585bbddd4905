"""Techniques of language models."""

import torch

from lightning_reg.techniques.language.cut_cross_entropy import (
    CutCrossEntropyMixin,
    cut_cross_entropy,
)
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ClassifierHost


class CutHost(CutCrossEntropyMixin, ClassifierHost):
    """The classifier with its head inside the loss."""

    filter_eps = 0.0

    def compute(self, batch):
        x, y = self.split(batch)
        hidden = self.dropout(self.encoder(x))
        loss = self.cut_cross_entropy(hidden, y, self.head, filter_eps=self.filter_eps)
        return loss, {"logits": self.head(hidden), "inputs": x, "targets": y}


def cut_host(options, args):
    host = CutHost(options)
    # Refused when the host is made, as the contract wants it.
    host.cut_cross_entropy(torch.zeros(1, 16), torch.zeros(1).long(), host.head, **args)
    host.filter_eps = args.get("filter_eps", 0.0)
    return host


def _function():
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in "fw")
    targets = torch.tensor([0, 4, 2, 2, 1])
    inputs = (features.requires_grad_(), weight.requires_grad_())
    return lambda f, w: cut_cross_entropy(f, w, targets, block=2), inputs


CASES = {
    "CutCrossEntropyMixin": ContractCase(
        args={"filter_eps": 0.0},
        bad=[{"filter_eps": 1.0}, {"filter_eps": -0.1}],
        mixin=cut_host,
        gradcheck=_function,
        logs=(),
    ),
}
