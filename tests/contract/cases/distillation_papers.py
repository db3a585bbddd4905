"""Techniques that learn from features or from several teachers."""

import torch
from lightning.pytorch.callbacks import Callback

from lightning_reg.techniques.distillation.mtard import mtard
from lightning_reg.techniques.distillation.multi_aspect_distillation import (
    MultiAspectDistillationMixin,
    multi_aspect_distillation,
)
from lightning_reg.techniques.distillation.norm_direction_distillation import (
    norm_direction_distillation,
)
from lightning_reg.techniques.distillation.token_relationship_graph_distillation import (
    token_context_distillation,
    token_contrast_distillation,
    token_graph_distillation,
)
from lightning_reg.techniques.distillation.two_teacher_regression import (
    assistive_loss,
    teacher_bounded_loss,
)
from lightning_reg.techniques.distillation.weighted_self_distillation import (
    WeightedSelfDistillation,
    weighted_self_distillation,
)
from lightning_reg.techniques.gradients.adversarial_training import pgd_attack
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ClassifierHost, ImageHost, RegressorHost
from tests.contract.cases.distillation import TrainedTeacher, moved

_GENERATOR = torch.Generator().manual_seed(0)


class FixedTeacher(torch.nn.Module):
    """A linear network with the same weights wherever it is made."""

    def __init__(self, scale: float = 1.0, phase: float = 0.0) -> None:
        super().__init__()
        self.map = torch.nn.Linear(8, 4)
        with torch.no_grad():
            places = torch.arange(32.0).view(4, 8) + phase
            self.map.weight.copy_(scale * places.sin())
            self.map.bias.zero_()

    def forward(self, x):
        return self.map(x)


def _in_yaml(scale, phase):
    path = "tests.contract.cases.distillation_papers.FixedTeacher"
    return {"class_path": path, "init_args": {"scale": scale, "phase": phase}}


class AskedHost(MultiAspectDistillationMixin, ClassifierHost):
    """The classifier with outputs for five aspects, whose answers follow from the inputs."""

    def compute(self, batch):
        x, y = self.split(batch)
        hidden = self.encoder(x)
        logits = self.head(self.dropout(hidden))
        loss = torch.nn.functional.cross_entropy(logits, y)
        loss = self.distill_aspects(loss, features=hidden, aspects=_answers(x))
        return loss, {"logits": logits, "inputs": x, "targets": y}


def asked_host(options, args):
    host = AskedHost(options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        host.add_aspect_head(**{"in_features": 16, "num_aspects": 5, **args})
    return host


def _answers(x):
    """With unequal numbers of answers from sample to sample."""
    answers = torch.sigmoid(3 * x[:, :5])
    return answers.masked_fill(x[:, 3:] > 1.5, float("nan"))


def _answered(probe):
    logits = probe.module.aspect_head(probe.features["encoder"])
    losses = [
        -(q * z.sigmoid().log() + (1 - q) * (1 - z.sigmoid()).log())
        for z, q in zip(logits.flatten(), _answers(probe.inputs).flatten(), strict=True)
        if not q.isnan()
    ]
    return torch.stack(losses).mean()


class EarlierGeneration(Callback):
    """Gives the technique a generation that has been trained."""

    def setup(self, trainer, pl_module, stage):
        for callback in trainer.callbacks:
            if isinstance(callback, WeightedSelfDistillation):
                weights = {k: moved(v) for k, v in pl_module.state_dict().items()}
                state = {"teacher": weights, "taken_at": 0}
                callback.load_state_dict({**state, "first": {}, "generation": 1, "trial": False})


def _generations():
    return [EarlierGeneration()]


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


def _repeated(probe):
    earlier = {k: moved(v) for k, v in probe.module.state_dict().items()}
    then = torch.func.functional_call(probe.module.eval(), earlier, (probe.inputs,)).softmax(1)
    p, y = probe.logits.softmax(1), torch.nn.functional.one_hot(probe.targets, 4)
    return (0.3 * (p - y) ** 2 + 0.7 * (p - then) ** 2).mean()


def _weighted():
    return weighted_self_distillation, (
        _random(5, 3).requires_grad_(),
        _random(5, 3),
        _random(5, 3),
        0.3,
    )


def _related(probe):
    """Token by token, in loops."""
    network = probe.technique.teacher.network
    maps = probe.features["stem"], network.stem(probe.inputs).detach()
    images = [m.flatten(2).transpose(1, 2) for m in maps]
    units = [t / t.norm(dim=-1, keepdim=True) for t in images]
    context = torch.stack(
        [(s @ s.T - t @ t.T).square().mean() for s, t in zip(*units, strict=True)]
    ).mean()
    own, theirs = (u.flatten(0, 1) for u in units)
    graph, contrast = [], []
    for i in range(len(own)):
        others = [j for j in range(len(own)) if j != i]
        near = sorted(others, key=lambda j: -float(theirs[i] @ theirs[j]))[:5]
        p = (theirs[near] @ theirs[i] / 0.5).softmax(0)
        q = (own[near] @ own[i] / 0.5).softmax(0)
        graph.append((p * (p / q).log()).sum())
        contrast.append(-(theirs @ own[i] / 0.5).log_softmax(0)[i])
    return 2 * torch.stack(graph).mean() + 0.5 * torch.stack(contrast).mean() + 3 * context


def _relations():
    tokens = _random(2, 4, 3).requires_grad_()
    teacher = _random(2, 4, 3)

    def function(student):
        own, theirs = student.flatten(0, 1), teacher.flatten(0, 1)
        graph = token_graph_distillation(own, theirs, 3, 0.5)
        contrast = token_contrast_distillation(own, theirs, 0.5)
        return graph, contrast, token_context_distillation(student, teacher)

    return function, (tokens,)


def _balanced(probe):
    """The first step: equal weights, temperatures of 1."""
    moved = pgd_attack(probe.module, probe.inputs, probe.targets, 0.4, 0.2, steps=2)
    parts = []
    for role, x in (("clean_teacher", probe.inputs), ("robust_teacher", moved)):
        p = probe.technique.teachers[role].network.double()(x).softmax(1)
        parts.append((p * (p.log() - probe.module(x).log_softmax(1))).sum(1).mean())
    return 0.5 * parts[0] + 0.5 * parts[1]


_MTARD = {
    "strength": 0.8,
    "epsilon": 0.4,
    "step_size": 0.2,
    "steps": 2,
    "weight_rate": 0.3,
    "temperature_rate": 0.4,
}


def _led(probe):
    """Number by number."""
    total = 0.0
    tough, tolerant = (t.network.double()(probe.inputs) for t in probe.technique.teachers.values())
    for s, y, one, two in zip(
        *(v.flatten().tolist() for v in (probe.logits, probe.targets, tough, tolerant)), strict=True
    ):
        a, r = abs(s - y), abs(two - y)
        total += 2 * (3 * a if a <= r else a * a + 3 * r - r * r)
        for r, pull, push in ((abs(one - y), 1.9, 0.45), (abs(two - y), 1.8, 0.4)):
            total += pull * (a - r) if a > r else -push * (r - a) if a >= 0.15 * r else 0.0
    return total / probe.logits.numel()


def _regression():
    """Away from the kinks, where finite differences mean nothing."""
    targets, teacher = _random(5, 3), _random(5, 3)
    apart = (teacher - targets).abs()
    outputs = (targets + apart * torch.tensor([1.6, -0.6, 0.05])).requires_grad_()

    def function(s):
        return assistive_loss(s, targets, teacher), teacher_bounded_loss(s, targets, teacher)

    return function, (outputs,)


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
    "WeightedSelfDistillation": ContractCase(
        args={"strength": 0.7, "form": "mse"},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -0.1},
            {"strength": 1.1},
            {"form": "mae"},
            {"replaces": "all"},
        ],
        bad_late=[{"optimal": True}],
        companions=_generations,
        expected=_repeated,
        gradcheck=_weighted,
    ),
    "TokenRelationshipGraphDistillation": ContractCase(
        args={
            "strength": 1.0,
            "layer": "stem",
            "source": "reference",
            "local_weight": 2.0,
            "global_weight": 0.5,
            "context_weight": 3.0,
            "neighbors": 5,
            "temperature": 0.5,
            "tokens": 10_000,
        },
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"source": None},
            {"layer": ""},
            {"teacher_layer": 3},
            {"local_weight": -1.0},
            {"local_weight": 0.0, "global_weight": 0.0, "context_weight": 0.0},
            {"neighbors": 0},
            {"tokens": 0.5},
            {"temperature": 0.0},
        ],
        bad_late=[{"layer": "no_such_layer"}],
        host=ImageHost,
        companions=_companions,
        expected=_related,
        gradcheck=_relations,
    ),
    "MTARD": ContractCase(
        args={
            **_MTARD,
            "clean_teacher": FixedTeacher(1.0, 0.5),
            "robust_teacher": FixedTeacher(0.3, 1.5),
        },
        yaml={
            **_MTARD,
            "clean_teacher": _in_yaml(1.0, 0.5),
            "robust_teacher": _in_yaml(0.3, 1.5),
        },
        neutral={"strength": 0.0},
        bad=[
            {"strength": 1.1},
            {"clean_teacher": None},
            {"robust_teacher": "resnet"},
            {"epsilon": -0.1},
            {"steps": 0},
            {"weight_rate": 2.0},
            {"temperature_rate": -1.0},
            {"temperature_bounds": (0.0, 1.0)},
            {"temperature_bounds": (3.0, 1.0)},
        ],
        expected=_balanced,
        gradcheck=lambda: (mtard, (_random(5, 4).requires_grad_(), _random(5, 4), 1.7)),
        logs=(
            "reg/mtard",
            "reg/mtard_clean_weight",
            "reg/mtard_clean_teacher_temperature",
            "reg/mtard_robust_teacher_temperature",
        ),
    ),
    "TwoTeacherRegression": ContractCase(
        args={
            "strength": 0.7,
            "tough_teacher": FixedTeacher(0.2, 0.5),
            "tolerant_teacher": FixedTeacher(0.3, 1.5),
        },
        yaml={
            "strength": 0.7,
            "tough_teacher": _in_yaml(0.2, 0.5),
            "tolerant_teacher": _in_yaml(0.3, 1.5),
        },
        neutral={"strength": 0.0},
        bad=[
            {"strength": 1.1},
            {"tough_teacher": None},
            {"tolerant_teacher": 3},
            {"main_weight": -1.0},
            {"tough_pull": -1.0},
            {"tolerant_push": -1.0},
            {"near": 1.5},
        ],
        host=RegressorHost,
        expected=_led,
        gradcheck=_regression,
    ),
    "MultiAspectDistillationMixin": ContractCase(
        args={"strength": 5.0},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"in_features": 0}, {"num_aspects": 2.5}],
        mixin=asked_host,
        expected=_answered,
        gradcheck=lambda: (
            multi_aspect_distillation,
            (_random(5, 4).requires_grad_(), torch.sigmoid(_random(5, 4))),
        ),
        logs=("reg/multi_aspect_distillation",),
    ),
}
