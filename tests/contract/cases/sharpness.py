"""Contract cases of the SAM family, and of what reaches flat minima without a second pass."""

import random

import torch
from lightning.pytorch.callbacks import Callback

from lightning_reg.engine.random import base_seed, stream_seed
from lightning_reg.mechanisms.normalized_ascent import normalized_ascent
from lightning_reg.techniques.sharpness.gsam import gsam_gradient
from lightning_reg.techniques.sharpness.look_sam import look_sam_gradient
from lightning_reg.techniques.sharpness.mesa import mesa_divergence
from lightning_reg.techniques.sharpness.saf import SAF, trajectory_loss
from lightning_reg.techniques.sharpness.udim import domain_inconsistency
from lightning_reg.techniques.sharpness.wsam import wsam_gradient
from lightning_reg.testing import ContractCase, Probe
from lightning_reg.testing.hosts import CLASSES, SAMPLES

RHO, BETA = 0.3, 0.7


def _sam(probe: Probe) -> torch.Tensor:
    """The rise from the weights to SAM's."""
    return _rise(probe, [p for p in probe.module.parameters() if p.requires_grad], RHO)


def _rise(probe: Probe, weights, rho) -> torch.Tensor:
    """The rise of the loss when ``weights`` move by ``rho`` along their gradient."""
    gradients = torch.autograd.grad(probe.loss, weights)
    with torch.no_grad():
        for weight, move in zip(weights, normalized_ascent(gradients, rho), strict=True):
            weight += move
        return probe.module.compute((probe.inputs.detach(), probe.targets))[0] - probe.loss


def _esam(probe: Probe) -> torch.Tensor:
    """The rise where the tensors that the first step chooses move by rho / beta."""
    weights = [p for p in probe.module.parameters() if p.requires_grad]
    draws = random.Random(stream_seed(base_seed(), "esam", "step", 0, -1))
    chosen = [w for w in weights if draws.random() < BETA]
    assert 0 < len(chosen) < len(weights)
    return _rise(probe, chosen, RHO / BETA)


def _of_two(function, **arguments):
    """A function of two lists of two tensors each, as one of four tensors."""

    def make():
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(4)]

        def flat(*tensors):
            return tuple(function(tensors[:2], tensors[2:], **arguments))

        return flat, tuple(t.requires_grad_() for t in inputs)

    return make


class Past(Callback):
    """Gives SAF a past: the first epoch of a run has none, and a check trains one."""

    def setup(self, trainer, pl_module, stage):
        for callback in trainer.callbacks:
            if isinstance(callback, SAF):
                state = {"table": _table(), "seen": torch.ones(SAMPLES, dtype=torch.bool)}
                callback.load_state_dict({"memories": [{}, state], "begun": -1})


def _past():
    return [Past()]


def _nothing(probe: Probe) -> float:
    return 0.0


def _table():
    return 3 * torch.arange(float(SAMPLES * CLASSES)).view(SAMPLES, CLASSES).sin()


def _saf(probe: Probe) -> torch.Tensor:
    return trajectory_loss(probe.logits, _table()[probe.index].to(probe.logits), 2.0).mean()


def _inconsistency():
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 2), (5, 3), (5, 2), (5, 3))
    tensors = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    targets = torch.tensor([0, 1, 2, 0, 1])
    return domain_inconsistency, (*(t.requires_grad_() for t in tensors), targets)


def _divergence(function):
    def make():
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(5, 4, dtype=torch.float64, generator=generator).requires_grad_()
        return function, (logits, torch.randn(5, 4, dtype=torch.float64, generator=generator), 2.0)

    return make


# "rank" takes a whole accumulation window, which the check of accumulation compares; "global" is
# the option under which ranks equal one process.
CASES = {
    "GSAM": ContractCase(
        args={"rho": RHO, "alpha": 0.8, "sharpness": "rank"},
        neutral={"rho": 0.0},
        bad=[{"rho": -0.1}, {"alpha": -1.0}, {"eta": -1.0}, {"sharpness": "all"}],
        expected=_sam,
        gradcheck=_of_two(gsam_gradient, alpha=0.8),
        joint={"sharpness": "global"},
    ),
    "WSAM": ContractCase(
        args={"rho": RHO, "gamma": 0.8, "sharpness": "rank"},
        neutral={"rho": 0.0},
        bad=[{"rho": -0.1}, {"gamma": 1.0}, {"gamma": -0.1}, {"sharpness": "all"}],
        expected=_sam,
        gradcheck=_of_two(wsam_gradient, gamma=0.8),
        joint={"sharpness": "global"},
    ),
    "LookSAM": ContractCase(
        args={"rho": RHO, "k": 2, "sharpness": "rank"},
        neutral={"rho": 0.0},
        bad=[{"rho": -0.1}, {"k": 0}, {"k": 1.5}, {"alpha": -1.0}, {"sharpness": "all"}],
        expected=_sam,
        gradcheck=_of_two(look_sam_gradient, alpha=0.7),
        joint={"sharpness": "global"},
    ),
    "ESAM": ContractCase(
        args={"rho": RHO, "beta": BETA, "gamma": 0.5, "sharpness": "rank"},
        neutral={"rho": 0.0},
        bad=[{"rho": -0.1}, {"beta": 0.0}, {"gamma": 1.5}, {"sharpness": "all"}],
        expected=_esam,
        joint={"sharpness": "global", "gamma": 1.0},
    ),
    "SAF": ContractCase(
        args={"strength": 1.0, "temperature": 2.0, "lag": 1, "start": 0},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"temperature": 0.0}, {"lag": 0}, {"start": -1}],
        companions=_past,
        expected=_saf,
        gradcheck=_divergence(trajectory_loss),
    ),
    "MESA": ContractCase(
        args={"strength": 20.0, "decay": 0.9, "temperature": 2.0, "start": 0},
        neutral={"strength": 0.0},
        bad=[{"strength": -1.0}, {"temperature": 0.0}, {"decay": 1.5}, {"start": -1}],
        # At the first step the average is the weights themselves.
        expected=_nothing,
        gradcheck=_divergence(mesa_divergence),
    ),
    "UDIM": ContractCase(
        args={"rho": RHO, "layer": "encoder", "start": 0.0, "sharpness": "rank"},
        neutral={"rho": 0.0},
        bad=[
            {"rho": -0.1},
            {"weight": -1.0},
            {"rho_x": -1.0},
            {"start": 2.0},
            {"normalize": "all"},
            {"layer": ""},
        ],
        expected=_sam,
        gradcheck=_inconsistency,
    ),
}
