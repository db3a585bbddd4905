"""Penalties on a critic's gradient, under manual optimization."""

from dataclasses import replace

import torch
from torch import nn

from lightning_reg.techniques.generative.r1_penalty import r1_penalty
from lightning_reg.techniques.generative.wasserstein_gradient_penalty import (
    wasserstein_gradient_penalty,
)
from lightning_reg.testing import ContractCase, ContractHost, HostOptions
from lightning_reg.testing.hosts import SAMPLES, TensorItems


class CriticHost(ContractHost):
    """A critic that tells real points from others; it optimizes manually."""

    def __init__(self, options=None):
        options = options if options is not None else HostOptions()
        super().__init__(replace(options, manual=True))

    def build(self, options):
        middle = nn.BatchNorm1d(8) if options.batch_norm else nn.Identity()
        self.critic = nn.Sequential(
            nn.Linear(3, 8), middle, nn.Tanh(), nn.Dropout(options.dropout), nn.Linear(8, 1)
        )

    def compute(self, batch):
        real, fake = batch
        scores = self.critic(real)
        loss = self.critic(fake).mean() - scores.mean()
        signals = {"critic": self.critic, "real": real, "fake": fake}
        return loss, {"logits": scores, "inputs": real, **signals}

    @staticmethod
    def dataset(options):
        real, fake = torch.randn(2, SAMPLES, 3, generator=torch.Generator().manual_seed(1))
        return TensorItems(None, real + 1.0, fake)


def _critic(first, second):
    return lambda x: torch.tanh(x @ first) @ second


def _inputs():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    second = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    return first, second


def _samples():
    return torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def _r1(first, second):
    return r1_penalty(_critic(first, second), _samples()[0])


def _wasserstein(first, second):
    epsilon = torch.linspace(0, 1, 4, dtype=torch.float64)
    return wasserstein_gradient_penalty(_critic(first, second), *_samples(), epsilon)


CASES = {
    "R1Penalty": ContractCase(
        args={"strength": 2.0},
        neutral={"strength": 0.0},
        bad=[{"interval": 0}, {"interval": 1.5}],
        host=CriticHost,
        expected=lambda probe: r1_penalty(probe.module.critic, probe.inputs).mean(),
        gradcheck=lambda: (_r1, _inputs()),
    ),
    "WassersteinGradientPenalty": ContractCase(
        args={"strength": 2.0},
        neutral={"strength": 0.0},
        bad=[{"interval": 0}, {"interval": True}],
        host=CriticHost,
        gradcheck=lambda: (_wasserstein, _inputs()),
    ),
}
