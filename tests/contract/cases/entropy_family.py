"""Techniques on entropies of outputs and codes."""

import torch

from lightning_reg.techniques.features.discrete_infomax import discrete_infomax
from lightning_reg.techniques.language.ema_reference_kl import ema_reference_kl
from lightning_reg.techniques.segmentation.prior_aware_entropy import prior_aware_entropy
from lightning_reg.testing import ContractCase

PRIOR = [0.7, 0.1, 0.1, 0.1]


def _numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


CASES = {
    "DiscreteInfomax": ContractCase(
        args={"strength": 0.5, "layer": "encoder", "entries": 4},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"entries": 0}, {"independence": -1.0}, {"layer": ""}],
        bad_late=[{"layer": "no_such_layer"}],
        expected=lambda p: discrete_infomax(p.features["encoder"].view(-1, 4, 4), p.targets),
        gradcheck=lambda: (
            lambda z: discrete_infomax(z, torch.tensor([0, 1, 0, 2, 1])),
            (_numbers(5, 3, 2).requires_grad_(),),
        ),
    ),
    "EMAReferenceKL": ContractCase(
        args={"strength": 0.5, "entropy_bonus": 0.5, "decay": 0.5},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"entropy_bonus": -0.1}, {"decay": 1.5}, {"class_dim": 1.5}],
        expected=lambda p: ema_reference_kl(p.logits, p.logits, 0.5).mean(),
        gradcheck=lambda: (
            lambda z: ema_reference_kl(z, _numbers(6, 4, seed=1), 0.3),
            (_numbers(6, 4).requires_grad_(),),
        ),
    ),
    "PriorAwareEntropy": ContractCase(
        args={"strength": 0.5, "prior": PRIOR},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"prior": [0.5, 0.6]},
            {"prior": [1.5, -0.5]},
            {"prior": "prior"},
            {"prior_weight": -1.0},
            {"proportion": "max"},
            {"class_weights": [-1.0, 1.0, 1.0, 1.0]},
        ],
        expected=lambda p: prior_aware_entropy(p.logits, torch.tensor(PRIOR)).mean(),
        gradcheck=lambda: (
            lambda z: prior_aware_entropy(z, torch.tensor([0.2, 0.3, 0.5]).double()),
            (_numbers(2, 3, 4).requires_grad_(),),
        ),
    ),
}
