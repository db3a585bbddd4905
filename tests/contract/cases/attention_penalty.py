"""Penalties on attention."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.features.attention_entropy_maximization import (
    attention_entropy_maximization,
)
from lightning_reg.techniques.features.attention_entropy_regularization import (
    attention_entropy_regularization,
)
from lightning_reg.testing import ContractCase


def _attention():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)


def _logs(probe):
    """What the encoder of the host gives, as logits of one query."""
    return F.log_softmax(probe.features["encoder"], dim=1)[:, None, None]


_BAD = [{"layers": []}, {"layers": ""}, {"from_logits": "no"}, {"element": 1.5}]

CASES = {
    "AttentionEntropyMaximization": ContractCase(
        args={"strength": -1.0, "layers": "encoder", "from_logits": True},
        neutral={"strength": 0.0},
        bad=_BAD,
        bad_late=[{"layers": "no_such_layer"}, {"layers": ["encoder", "no_such_layer"]}],
        expected=lambda probe: attention_entropy_maximization(_logs(probe)).mean(),
        gradcheck=lambda: (
            lambda z: attention_entropy_maximization(z.log_softmax(-1)),
            (_attention(),),
        ),
    ),
    "AttentionEntropyRegularization": ContractCase(
        args={"strength": 1.0, "layers": "encoder", "from_logits": True, "thresholds": 0.3},
        neutral={"strength": 0.0},
        bad=[*_BAD, {"strength": -0.1}, {"thresholds": 1.1}, {"margin": -0.1}, {"context_size": 1}],
        bad_late=[{"layers": "no_such_layer"}, {"thresholds": "no_such_parameter"}],
        expected=lambda probe: attention_entropy_regularization(_logs(probe), 0.3).mean(),
        gradcheck=lambda: (
            lambda z, t: attention_entropy_regularization(z.log_softmax(-1), t, 0.0),
            (_attention(), torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)),
        ),
    ),
}
