"""Training on adversarial inputs.

Without a random start, where ranks and micro-batches can be compared with a joint batch.
"""

import torch

from lightning_reg.techniques.gradients.aaer import aaer
from lightning_reg.techniques.gradients.adversarial_training import pgd_attack
from lightning_reg.techniques.gradients.elle import elle
from lightning_reg.testing import ContractCase

BAD = [
    {"epsilon": -0.1},
    {"epsilon": float("inf")},
    {"step_size": 0.0},
    {"norm": "l1"},
    {"random_start": -1.0},
    {"bounds": [1.0, 0.0]},
]


def _rise(probe):
    moved = pgd_attack(probe.module, probe.inputs, probe.targets, 0.4, steps=2)
    with torch.no_grad():
        return probe.module.compute((moved, probe.targets))[0] - probe.loss


def _abnormal(probe):
    # Steps of 3 in a ball of 3: far enough to make some examples easier.
    moved = pgd_attack(probe.module, probe.inputs, probe.targets, 3.0, steps=1)
    return aaer(probe.logits, probe.module(moved), probe.targets)


def _logits():
    # Rows that stay normal are held fixed: their logits are constants of the penalty.
    start = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.2]], dtype=torch.float64)
    normal = torch.tensor([[1.0, 0.3], [0.2, 0.8]], dtype=torch.float64)
    abnormal = torch.tensor([[3.0, 0.1], [2.5, -0.4]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 0, 0])

    def value(z):
        return aaer(start, torch.cat([normal, z]), targets, loss_gradient=True)

    return value, (abnormal,)


def _losses():
    generator = torch.Generator().manual_seed(0)
    losses = [torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(3)]
    alpha = torch.rand(5, dtype=torch.float64, generator=generator)
    return (lambda *values: elle(*values, alpha)), tuple(v.requires_grad_() for v in losses)


CASES = {
    "AdversarialTraining": ContractCase(
        args={"strength": 0.7, "epsilon": 0.4, "steps": 2},
        neutral={"strength": 0.0},
        bad=[{"strength": -0.1}, {"strength": 1.1}, {"steps": 0}, {"labels": "none"}, *BAD],
        expected=_rise,
    ),
    "AAER": ContractCase(
        args={"strength": 0.5, "epsilon": 3.0, "random_start": 0.0},
        neutral={"epsilon": 0.0},
        bad=[{"strength": -0.1}, {"loss_weight": -1.0}, {"logit_weight": -1.0}, *BAD],
        expected=_abnormal,
        gradcheck=_logits,
    ),
    "ELLE": ContractCase(
        args={"strength": 1.0, "epsilon": 1.0, "adaptive": True},
        neutral={"epsilon": 0.0},
        bad=[{"strength": -0.1}, {"decay": 0.0}, {"sensitivity": -1.0}, *BAD],
        gradcheck=_losses,
        logs=("reg/elle", "reg/elle_lambda"),
    ),
}
