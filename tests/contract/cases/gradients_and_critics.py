"""Input-Fisher, right reasons, flooding, terms on grids, critics, spectral normalization."""

import torch

from lightning_reg.mechanisms.contextual_decomposition import decompose, flat_layers
from lightning_reg.techniques.fields.h1_seminorm_loss import h1_seminorm_loss
from lightning_reg.techniques.fields.sobolev_norm_loss import sobolev_norm_loss
from lightning_reg.techniques.generative.dragan_penalty import dragan_penalty
from lightning_reg.techniques.generative.r2_penalty import r2_penalty
from lightning_reg.techniques.gradients.cdep import cdep
from lightning_reg.techniques.gradients.fisher_information_penalty import (
    fisher_information_penalty,
)
from lightning_reg.techniques.gradients.right_for_right_reasons import right_for_right_reasons
from lightning_reg.techniques.outputs.flooding import flooding
from lightning_reg.techniques.reparameterization.spectral_normalization import (
    spectral_normalization,
)
from lightning_reg.testing import ContractCase, DictBatchHost, RegressorHost
from lightning_reg.testing.hosts import TensorItems
from tests.contract.cases.critic_penalty import CriticHost, _critic, _inputs, _samples


class MaskedHost(DictBatchHost):
    """A classifier whose batch has masks: the first three inputs must not matter."""

    @staticmethod
    def dataset(options):
        base = DictBatchHost.dataset(options)
        items = [base[i] for i in range(len(base))]
        values = [torch.stack([torch.as_tensor(item[k]) for item in items]) for k in items[0]]
        mask = torch.zeros(len(base), 8)
        mask[:, :3] = 1.0
        return TensorItems((*items[0], "mask"), *values, mask)


def _pair():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    return x, weight


def _fisher(x, weight):
    return fisher_information_penalty(torch.tanh(x @ weight), x)


def _reasons(x, weight):
    mask = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    return right_for_right_reasons(torch.tanh(x @ weight), x, mask)


def _contribution(probe):
    layers = flat_layers([probe.module.encoder, probe.module.head])
    return cdep(*decompose(layers, probe.inputs, (torch.arange(8) < 3).double()[None])).mean()


def _losses():
    return torch.tensor([0.1, 0.9, 2.0], dtype=torch.float64, requires_grad=True)


def _fields():
    u, v = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return u, v.requires_grad_()


def _r2(first, second):
    return r2_penalty(_critic(first, second), _samples()[1])


def _dragan(first, second):
    alpha = torch.linspace(0, 1, 4, dtype=torch.float64)
    return dragan_penalty(_critic(first, second), *_samples(), alpha)


def _normalized(weight):
    u, _, vh = torch.linalg.svd(weight.detach())
    return spectral_normalization(weight, u[:, 0], vh[0])


def _flooded(probe):
    losses = torch.nn.functional.cross_entropy(probe.logits, probe.targets, reduction="none")
    return flooding(losses, 2.0, losses.mean()).mean()


CASES = {
    "FisherInformationPenalty": ContractCase(
        args={"strength": 0.5},
        neutral={"strength": 0.0},
        bad=[{"samples": 0}, {"samples": "all"}, {"layer": ""}],
        bad_late=[{"layer": "no_such_layer"}],
        expected=lambda probe: fisher_information_penalty(probe.logits, probe.inputs).mean(),
        gradcheck=lambda: (_fisher, _pair()),
    ),
    "CDEP": ContractCase(
        args={"strength": 1.0, "layers": ["encoder", "dropout", "head"]},
        neutral={"strength": 0.0},
        bad=[{"layers": []}, {"layers": [""]}, {"mask": ""}, {"score": "none"}],
        bad_late=[{"layers": ["no_such_layer"]}],
        host=MaskedHost,
        expected=_contribution,
        gradcheck=lambda: (cdep, (_pair()[0], _pair()[1][:3].detach().requires_grad_())),
    ),
    "RightForRightReasons": ContractCase(
        args={"strength": 0.5},
        neutral={"strength": 0.0},
        bad=[{"mask": ""}, {"layer": ""}],
        bad_late=[{"layer": "no_such_layer"}],
        host=MaskedHost,
        expected=lambda probe: right_for_right_reasons(
            probe.logits, probe.inputs, (torch.arange(8) < 3).double()
        ).mean(),
        gradcheck=lambda: (_reasons, _pair()),
    ),
    "Flooding": ContractCase(
        args={"level": 2.0},
        neutral={"strength": 0.0},
        bad=[{"strength": 1.1}, {"level": -0.1}, {"per": "epoch"}, {"replaces": "nothing"}],
        expected=_flooded,
        gradcheck=lambda: (lambda x: flooding(x, 0.5), (_losses(),)),
    ),
    "H1SeminormLoss": ContractCase(
        args={"strength": 0.5, "gamma": 1.0, "data_weight": 0.5},
        neutral={"strength": 0.0},
        bad=[
            {"gamma": -1.0},
            {"data_weight": -1.0},
            {"spacing": 0.0},
            {"spacing": [0.1, 0.1]},
            {"grid_dims": 0},
        ],
        host=RegressorHost,
        expected=lambda probe: h1_seminorm_loss(probe.logits, probe.targets, 1.0, 1.0, 0.5).mean(),
        gradcheck=lambda: (lambda u, v: h1_seminorm_loss(v, u, 0.5, root=True), _fields()),
    ),
    "SobolevNormLoss": ContractCase(
        args={"strength": 0.5, "s": 1.0},
        neutral={"strength": 0.0},
        bad=[{"s": float("inf")}, {"frequencies": "none"}, {"grid_dims": 0}, {"spacing": -1.0}],
        host=RegressorHost,
        expected=lambda probe: sobolev_norm_loss(probe.logits - probe.targets, 1.0).mean(),
        gradcheck=lambda: (lambda u, v: sobolev_norm_loss(v - u, -1.0), _fields()),
    ),
    "R2Penalty": ContractCase(
        args={"strength": 2.0},
        neutral={"strength": 0.0},
        bad=[{"interval": 0}],
        host=CriticHost,
        gradcheck=lambda: (_r2, _inputs()),
    ),
    "DraganPenalty": ContractCase(
        args={"strength": 2.0},
        neutral={"strength": 0.0},
        bad=[{"interval": 0}, {"scale": -1.0}, {"center": -1.0}],
        host=CriticHost,
        gradcheck=lambda: (_dragan, _inputs()),
    ),
    "SpectralNormalization": ContractCase(
        args={"bound": 0.7},
        bad=[{"bound": 0.0}, {"bound": float("inf")}, {"iterations": 0}],
        bad_late=[{"parameters": "no_such_name"}],
        gradcheck=lambda: (_normalized, (_pair()[1],)),
        logs=(),
    ),
}
