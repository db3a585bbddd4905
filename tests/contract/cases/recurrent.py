"""Contract settings of techniques for recurrent networks."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_reg.techniques.gradients.vanishing_gradient_regularizer import (
    vanishing_gradient_penalty,
)
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ClassifierHost


class LastState(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(2, 16, batch_first=True)

    def forward(self, x):
        """(B, 16)."""
        return self.rnn(x)[0][:, -1]


class RecurrentHost(ClassifierHost):
    """The classifier, which reads its vectors as sequences of four steps."""

    def build(self, options):
        """A recurrent encoder and a head."""
        super().build(options)
        self.encoder = nn.Sequential(nn.Unflatten(1, (4, 2)), LastState())


def _omega(probe):
    """The states one by one, and their signals by autograd."""
    rnn = probe.module.encoder[1].rnn
    h, states = probe.inputs.new_zeros(len(probe.inputs), 16), []
    for x in probe.inputs.unflatten(1, (4, 2)).unbind(1):
        h = torch.tanh(
            F.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0 + rnn.bias_hh_l0) + h @ rnn.weight_hh_l0.T
        )
        states.append(h)
    loss = F.cross_entropy(probe.module.head(h), probe.targets)
    signals = torch.autograd.grad(loss, states)
    terms, _ = vanishing_gradient_penalty(
        torch.stack(signals), torch.stack(states), rnn.weight_hh_l0
    )
    return terms.mean()


def _terms(weight):
    generator = torch.Generator().manual_seed(1)
    g, h = (torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    return vanishing_gradient_penalty(g, h.tanh(), weight)[0]


def _weight():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, dtype=torch.float64, generator=generator, requires_grad=True)


CASES = {
    "VanishingGradientRegularizer": ContractCase(
        args={"strength": 1.0, "clip_norm": 0.5},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"clip_norm": 0.0}, {"layers": []}, {"layers": ""}],
        bad_late=[{"layers": "no_such_layer"}, {"layers": "head"}],
        host=RecurrentHost,
        expected=_omega,
        gradcheck=lambda: (_terms, (_weight(),)),
    ),
}
