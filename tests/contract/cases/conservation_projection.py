"""Predictions that obey a conservation law."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.fields.conservation_projection import (
    ConservationProjectionMixin,
    conservation_projection,
)
from lightning_reg.testing import ContractCase, RegressorHost


class ConservedHost(ConservationProjectionMixin, RegressorHost):
    """A regressor whose outputs sum to those of the targets."""

    def compute(self, batch):
        x, y = self.split(batch)
        prediction = self(x)
        variances = 0.1 + prediction.detach().square()
        total = prediction.new_zeros(len(x)) if y is None else y.sum(1)
        mean, _ = self.conserve(prediction, total, variances)
        loss = mean.square().mean() if y is None else F.mse_loss(mean, y)
        return loss, {"logits": prediction, "inputs": x, "targets": y}


def conserved_host(options, args):
    host = ConservedHost(options)
    host.set_conservation(**{"constraint": torch.ones(4), **args})
    return host


def _projection():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    variances = torch.rand(2, 3, dtype=torch.float64, generator=generator) + 0.1
    law = torch.ones(3, dtype=torch.float64, requires_grad=True)
    total = torch.ones(2, dtype=torch.float64, requires_grad=True)
    return conservation_projection, (mean, variances.requires_grad_(), law, total, 0.3)


CASES = {
    "ConservationProjectionMixin": ContractCase(
        args={"noise": 0.1},
        neutral={"noise": float("inf")},
        bad=[{"noise": -1.0}, {"noise": float("nan")}, {"constraint": 3}],
        host=RegressorHost,
        mixin=conserved_host,
        gradcheck=_projection,
        logs=(),
    ),
}
