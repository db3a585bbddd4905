"""Techniques that a LightningModule subclasses."""

import torch
from torch import nn

from lightning_reg.techniques.distillation.dual_head_distillation import (
    DualHeadDistillationMixin,
    dual_head_distillation,
)
from lightning_reg.techniques.noise.multi_sample_dropout import (
    MultiSampleDropoutMixin,
    multi_sample_dropout,
)
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import CLASSES, ClassifierHost


class MultiSampleHost(MultiSampleDropoutMixin, ClassifierHost):
    """The classifier with several dropout masks in front of its head."""

    def compute(self, batch):
        x, y = self.split(batch)
        loss, logits = self.multi_sample_loss(self.head, self.encoder(x), y)
        return loss, {"logits": logits, "inputs": x, "targets": y}


def multi_sample_host(options, args):
    host = MultiSampleHost(options)
    host.set_multi_sample_dropout(**args)
    return host


class DistilledHost(DualHeadDistillationMixin, ClassifierHost):
    """The classifier with a second head that learns from a teacher."""

    def compute(self, batch):
        x, y = self.split(batch)
        hidden = self.encoder(x)
        logits = self.head(self.dropout(hidden))
        loss = nn.functional.cross_entropy(logits, y)
        loss = self.distill(loss, features=hidden, inputs=x)
        return loss, {"logits": logits, "inputs": x, "targets": y}


def _teacher():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, CLASSES))


def distilled_host(options, args):
    host = DistilledHost(options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        host.add_dual_head(**{"teacher": _teacher(), "in_features": 16, "num_classes": 4, **args})
    return host


def _distillation(probe):
    taught = _teacher().double().eval()(probe.inputs)
    head = probe.module.dual_head
    return dual_head_distillation(head(probe.features["encoder"]), taught, 2.0).mean()


def _dropout_function():
    features = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def function(x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return multi_sample_dropout(x, 3, 0.5)

    return function, (features,)


def _distillation_function():
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    return dual_head_distillation, (student, torch.randn(3, 4, dtype=torch.float64), 2.0)


CASES = {
    "MultiSampleDropoutMixin": ContractCase(
        args={"samples": 4, "p": 0.5},
        # Dropout as the host has it in this check.
        neutral={"samples": 1, "p": 0.3},
        bad=[{"samples": 0}, {"samples": 1.5}, {"p": 1.0}, {"p": -0.1}],
        mixin=multi_sample_host,
        gradcheck=_dropout_function,
        logs=(),
    ),
    "DualHeadDistillationMixin": ContractCase(
        args={"strength": 5.0},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"temperature": 0.0}, {"teacher": "resnet"}],
        mixin=distilled_host,
        expected=_distillation,
        gradcheck=_distillation_function,
        logs=("reg/dual_head_distillation", "reg/dual_head_distillation_factor"),
    ),
}
