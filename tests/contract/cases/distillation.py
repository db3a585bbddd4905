"""Techniques that learn from the predictions of a teacher: here the module as it began."""

import torch
from lightning.pytorch.callbacks import Callback

from lightning_reg.mechanisms.given_teacher import GivenTeacher
from lightning_reg.techniques.distillation.class_relation_distillation import (
    class_relation_distillation,
)
from lightning_reg.techniques.distillation.decoupled_distillation import decoupled_distillation
from lightning_reg.techniques.distillation.hinton_distillation import hinton_distillation
from lightning_reg.techniques.distillation.plackett_luce_distillation import (
    plackett_luce_distillation,
)
from lightning_reg.techniques.distillation.random_teacher_distillation import (
    random_teacher_distillation,
)
from lightning_reg.testing import ContractCase

_GENERATOR = torch.Generator().manual_seed(0)
_STUDENT, _TEACHER = (torch.randn(5, 4, dtype=torch.float64, generator=_GENERATOR) for _ in "st")
_LABELS = torch.tensor([0, 1, 2, 3, 1])


class TrainedTeacher(Callback):
    """Gives the technique a teacher that is not the module as it is now."""

    def setup(self, trainer, pl_module, stage):
        for callback in trainer.callbacks:
            if isinstance(callback, GivenTeacher):
                weights = {k: moved(v) for k, v in pl_module.state_dict().items()}
                callback.load_state_dict({"teacher": weights, "taken_at": 0})


def moved(weight):
    shift = torch.arange(weight.numel()).view(weight.shape).sin()
    return weight + 0.3 * shift if weight.is_floating_point() else weight.clone()


def _companions():
    return [TrainedTeacher()]


def _teacher(probe):
    return probe.technique.teacher.network(probe.inputs)


def _function(loss, *settings):
    student = _STUDENT.clone().requires_grad_()
    return lambda s: loss(s, _TEACHER, *settings), (student,)


def _softened(probe):
    p, q = (_teacher(probe) / 2).softmax(1), (probe.logits / 2).softmax(1)
    return 4 * (p * (p.log() - q.log())).sum(1).mean()


def _decoupled(probe):
    p, q = (_teacher(probe) / 2).softmax(1), (probe.logits / 2).softmax(1)
    rows = []
    for t, s, y in zip(p, q, probe.targets, strict=True):
        rest = [c for c in range(len(t)) if c != y]
        binary = [(t[y], s[y]), (t[rest].sum(), s[rest].sum())]
        others = [(t[c] / t[rest].sum(), s[c] / s[rest].sum()) for c in rest]
        parts = [sum(a * (a / b).log() for a, b in pairs) for pairs in (binary, others)]
        rows.append(4 * (0.5 * parts[0] + 3.0 * parts[1]))
    return torch.stack(rows).mean()


def _ranked(probe):
    teacher, rows = _teacher(probe), []
    for t, s, y in zip(teacher, probe.logits, probe.targets, strict=True):
        left = sorted((c for c in range(len(t)) if c != y), key=lambda c: -float(t[c]))
        order, weights = [int(y), *left], t.softmax(0)
        rows.append(
            sum(
                weights[c] * -(s[c] - torch.logsumexp(s[order[k:]], 0)) for k, c in enumerate(order)
            )
        )
    return torch.stack(rows).mean()


def _related(probe):
    p = _teacher(probe)[:, :3].softmax(1)
    losses = -(p * probe.logits[:, :3].log_softmax(1)).sum(1)
    gate = probe.logits.softmax(1)[:, :3].sum(1)
    return (gate / gate.mean() * losses).mean()


def _random(probe):
    p, q = _teacher(probe).softmax(1), (probe.logits / 2).softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean()


_BAD = [
    {"strength": -1.0},
    {"source": None},
    {"source": "other"},
    {"teacher": torch.nn.Identity()},
    {"temperature": 0.0},
    {"decay": 2.0},
]

CASES = {
    "HintonDistillation": ContractCase(
        args={"strength": 3.0, "source": "reference", "temperature": 2.0},
        neutral={"strength": 0.0},
        bad=[*_BAD, {"ignore_index": 0.5}],
        companions=_companions,
        expected=_softened,
        gradcheck=lambda: _function(hinton_distillation, 1.7),
    ),
    "DecoupledDistillation": ContractCase(
        args={
            "strength": 2.0,
            "source": "reference",
            "alpha": 0.5,
            "beta": 3.0,
            "temperature": 2.0,
        },
        neutral={"strength": 0.0},
        bad=[*_BAD, {"alpha": -1.0}, {"beta": -1.0}],
        companions=_companions,
        expected=_decoupled,
        gradcheck=lambda: _function(decoupled_distillation, _LABELS, 0.5, 3.0, 1.7),
    ),
    "PlackettLuceDistillation": ContractCase(
        args={"strength": 2.0, "source": "reference"},
        neutral={"strength": 0.0},
        bad=_BAD,
        companions=_companions,
        expected=_ranked,
        gradcheck=lambda: _function(plackett_luce_distillation, _LABELS, 1.5),
    ),
    "ClassRelationDistillation": ContractCase(
        args={
            "strength": 2.0,
            "known": 3,
            "source": "reference",
            "temperature": 1.0,
        },
        neutral={"strength": 0.0},
        bad=[*_BAD, {"known": 1}],
        companions=_companions,
        expected=_related,
        gradcheck=lambda: _function(class_relation_distillation, 3, 0.7),
    ),
    "RandomTeacherDistillation": ContractCase(
        args={"strength": 2.0, "alpha": 0.5, "student_temperature": 2.0},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"alpha": 1.5},
            {"teacher_temperature": 0.0},
            {"student_temperature": -1.0},
        ],
        expected=_random,
        gradcheck=lambda: _function(random_teacher_distillation, 0.5, 1.5),
    ),
}
