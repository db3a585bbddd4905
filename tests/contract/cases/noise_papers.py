"""Experts, noisy fine-tuning, learned masks."""

import torch
from torch import nn

from lightning_reg.techniques.contrastive.pretext_task import (
    PretextTaskMixin,
    pretext_task_loss,
)
from lightning_reg.techniques.inputs.learned_noise_mask import beta_log_density
from lightning_reg.techniques.inputs.lie_symmetry_augment import lie_symmetry
from lightning_reg.techniques.noise.conditional_moe_routing import (
    ConditionalMoE,
    routing_budget,
)
from lightning_reg.techniques.noise.expert_dropout import mask_tokens
from lightning_reg.techniques.noise.noise_fit import noise_fit
from lightning_reg.techniques.reweighting.phased_curriculum import curriculum_weights
from lightning_reg.testing import ContractCase
from lightning_reg.testing.hosts import ClassifierHost, DictBatchHost, ImageHost

_GENERATOR = torch.Generator().manual_seed(0)
_ROWS = torch.randn(5, 4, dtype=torch.float64, generator=_GENERATOR)
_DROPPED = torch.tensor([True, False, False, True, False])


class Mixture(nn.Module):
    """Two experts with softmax gates."""

    def __init__(self, width, out):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, out) for _ in range(2)])
        self.router = nn.Linear(width, 2)

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        return sum(gates[..., [i]] * expert(x) for i, expert in enumerate(self.experts))


class MoEHost(ClassifierHost):
    """The classifier with a mixture of experts in its encoder."""

    def build(self, options):
        super().build(options)
        self.encoder[0] = Mixture(8, 16)


class ConditionalHost(ClassifierHost):
    """The classifier with a conditional mixture in its encoder."""

    def build(self, options):
        super().build(options)
        self.encoder[0] = ConditionalMoE(Mixture(8, 16), nn.Linear(8, 16), 8, gate_dropout=0.0)


class PretextHost(PretextTaskMixin, ImageHost):
    """The image classifier that also tells how images were turned."""

    def compute(self, batch):
        loss, signals = super().compute(batch)
        loss = self.pretext(loss, lambda x: self.encoder(self.stem(x)), signals["inputs"])
        return loss, signals


def pretext_host(options, args):
    host = PretextHost(options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        host.add_pretext_task(**{"in_features": 16, "hidden": [16, 8], **args})
    return host


def _turned(probe):
    turned = torch.cat([torch.rot90(probe.inputs, k, (2, 3)) for k in range(4)])
    module = probe.module
    logits = module.pretext_head(module.encoder(module.stem(turned)))
    labels = torch.arange(4).repeat_interleave(len(probe.inputs))
    return torch.nn.functional.cross_entropy(logits, labels)


def _rows():
    return _ROWS.clone().requires_grad_()


def _budget(probe):
    gates, _ = probe.module.encoder[0].gate(probe.inputs, None)
    return abs(gates.mean() - 0.9)


def _noisy_rows():
    # The targets are detached, which finite differences would not know.
    clean, first, second = torch.randn(3, 5, 4, dtype=torch.float64, generator=_GENERATOR)
    return lambda x: noise_fit(clean, x, second, 0.5, 0.3, 2.0), (first.requires_grad_(),)


def _moved():
    one = torch.tensor([0.3], dtype=torch.float64)
    settings = {"start": one, "shift": one, "velocity": one, "log_scale": one, "amplitude": one}
    field = torch.randn(1, 4, 6, dtype=torch.float64, generator=_GENERATOR)
    return (
        lambda u: lie_symmetry(u, "kdv", length=2.0, dt=0.5, **settings),
        (field.requires_grad_(),),
    )


CASES = {
    "ExpertDropout": ContractCase(
        args={"p": 0.5, "layers": "encoder.0.experts"},
        neutral={"p": 0.0},
        bad=[{"p": 1.0}, {"p": -0.1}, {"layers": []}, {"kind": "first"}],
        bad_late=[{"layers": "no_such_layer"}],
        host=MoEHost,
        gradcheck=lambda: (lambda x: mask_tokens(x, _DROPPED, 0.4), (_rows(),)),
    ),
    "ConditionalMoERouting": ContractCase(
        args={"strength": 5.0, "budget": 0.9},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"budget": 1.5}],
        host=ConditionalHost,
        expected=_budget,
        gradcheck=lambda: (lambda x: routing_budget(x.mean(), 0.9), (_rows(),)),
    ),
    "LearnedNoiseMask": ContractCase(
        args={"grid": 4, "kernel": 3, "sigma": 1.0, "channels": 1},
        neutral={"probability": 0.0},
        bad=[
            {"probability": 1.5},
            {"grid": 0},
            {"kernel": 4},
            {"channels": 1.5},
            {"policy": "resnet"},
            {"sigma": 0.0},
            {"lr": 0.0},
            {"momentum": 1.0},
            {"weight_decay": -1.0},
            {"decay": 1.0},
            {"average": 1.0},
        ],
        host=ImageHost,
        gradcheck=lambda: (
            lambda a, b: beta_log_density(a, b, _ROWS.sigmoid()),
            (_rows(), (0.5 * _ROWS.flip(1)).requires_grad_()),
        ),
        logs=("reg/learned_noise_mask", "reg/learned_noise_mask_reward"),
    ),
    "LieSymmetryAugment": ContractCase(
        args={"equation": "kdv", "length": 8.0, "dt": 0.1, "velocity": 1.0, "scale": 0.3},
        neutral={"probability": 0.0},
        bad=[
            {"equation": "laplace"},
            {"length": 0.0},
            {"dt": -1.0},
            {"shift": 1.5},
            {"velocity": -1.0},
            {"amplitude": 0.1},
            {"equation": "ks"},
            {"equation": "heat", "scale": 0.0},
            {"window": 0},
            {"targets": "moved"},
            {"targets": "field", "window": 4},
            {"probability": 2.0},
        ],
        host=ImageHost,
        gradcheck=_moved,
        logs=("reg/lie_symmetry_augment",),
    ),
    "NoiseFiT": ContractCase(
        args={"strength": 20.0, "layers": ["encoder", "head"], "k": 1, "noise_std": 1.0},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"layers": []},
            {"k": 3},
            {"k": 0},
            {"choose": "middle"},
            {"noise_std": 0.0},
            {"beta": -1.0},
            {"alpha": 0.0},
            {"consistency": -0.1},
            {"temperature": 0.0},
        ],
        bad_late=[{"layers": ["encoder", "no_such_layer"]}],
        gradcheck=_noisy_rows,
    ),
    "PretextTaskMixin": ContractCase(
        args={"strength": 5.0, "dropout": 0.0},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"task": "colour"},
            {"turns": "two"},
            {"grid": 1},
            {"grid": 2, "permutations": 25},
            {"hidden": [16]},
            {"dropout": 1.0},
        ],
        host=ImageHost,
        mixin=pretext_host,
        expected=_turned,
        gradcheck=lambda: (
            lambda z: pretext_task_loss(z, torch.tensor([0, 3, 1, 2, 2])),
            (_rows(),),
        ),
        logs=("reg/pretext_task", "reg/pretext_task_accuracy"),
        joint={},
    ),
    "PhasedCurriculum": ContractCase(
        args={"starts": [0.0, 2.0], "by": "step"},
        neutral={"strength": 0.0},
        bad=[
            {"starts": []},
            {"starts": [0.5, 1.0]},
            {"starts": [0.0, -1.0]},
            {"by": "week"},
            {"strength": 2.0},
            {"replaces": "all"},
        ],
        host=DictBatchHost,
        expected=lambda probe: 0.5,
        gradcheck=lambda: (
            lambda n: curriculum_weights(n, torch.tensor([0.0, 5.0, 1.0, 0.0, 2.0]).double(), 1.5),
            (torch.tensor([3.0, 1, 4, 2, 5]).double().requires_grad_(),),
        ),
        logs=("reg/phased_curriculum",),
    ),
}
