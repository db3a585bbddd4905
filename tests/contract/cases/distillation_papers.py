"""Techniques that learn from features or from several teachers."""

import torch

from lightning_reg.techniques.distillation.norm_direction_distillation import (
    norm_direction_distillation,
)
from lightning_reg.testing import ContractCase
from tests.contract.cases.distillation import TrainedTeacher

_GENERATOR = torch.Generator().manual_seed(0)


def _companions():
    return [TrainedTeacher()]


def _random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=_GENERATOR)


def _teacher_features(probe):
    return probe.technique.teacher.network.encoder(probe.inputs).detach()


def _pulled(probe):
    """By hand: the class means come from all samples of the host's training set."""
    network = probe.technique.teacher.network
    data = probe.module.dataset(probe.module.options)
    inputs = torch.stack([data[i][0] for i in range(len(data))]).double()
    labels = torch.tensor([int(data[i][1]) for i in range(len(data))])
    features = network.encoder(inputs).detach()
    rows = []
    for s, t, y in zip(
        probe.features["encoder"], _teacher_features(probe), probe.targets, strict=True
    ):
        mean = features[labels == y].mean(0)
        direction = mean / mean.norm()
        rows.append(1 - s @ direction / max(s.norm(), t.norm()))
    return torch.stack(rows).mean()


def _norm_direction():
    # Rows on both sides of the teacher's length.
    student = (_random(5, 3) * torch.tensor([[0.1], [0.1], [9.0], [9.0], [0.2]])).requires_grad_()
    teacher, directions = _random(5, 3), torch.nn.functional.normalize(_random(5, 3), dim=1)
    return norm_direction_distillation, (student, teacher, directions)


_LAYERS = [{"layer": ""}, {"teacher_layer": ""}]

CASES = {
    "NormDirectionDistillation": ContractCase(
        args={"strength": 2.0, "layer": "encoder", "source": "reference"},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"source": None},
            {"source": "ema"},
            {"teacher": torch.nn.Identity()},
            {"source": None, "teacher": "resnet"},
            {"layer": ""},
            {"class_means": [[1.0]]},
            {"class_means": torch.ones(3)},
        ],
        bad_late=[{"layer": "no_such_layer"}],
        companions=_companions,
        expected=_pulled,
        gradcheck=_norm_direction,
    ),
}
