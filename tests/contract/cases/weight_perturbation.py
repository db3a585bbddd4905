"""Contract cases of the techniques that differentiate at perturbed weights."""

import torch

from lightning_reg.techniques.sharpness.adversarial_model_perturbation import (
    adversarial_model_perturbation,
)
from lightning_reg.techniques.sharpness.sam import sam_perturbation
from lightning_reg.testing import ContractCase, Probe

RHO, EPSILON = 0.3, 0.2


def _rise(probe: Probe, displacement) -> torch.Tensor:
    """The rise of the loss when all trainable weights move by ``displacement(gradients)``."""
    weights = [p for p in probe.module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(probe.loss, weights)
    with torch.no_grad():
        for weight, move in zip(weights, displacement(list(gradients)), strict=True):
            weight += move
        batch = (probe.inputs.detach(), probe.targets)
        return probe.module.compute(batch)[0] - probe.loss


def _sam(probe: Probe) -> torch.Tensor:
    return _rise(probe, lambda gradients: sam_perturbation(gradients, RHO))


def _amp(probe: Probe) -> torch.Tensor:
    return _rise(probe, lambda gradients: adversarial_model_perturbation(gradients, EPSILON))


def _clipping():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2)]

    def clip(*displacement):
        return tuple(adversarial_model_perturbation(displacement, EPSILON))

    return clip, tuple(t.requires_grad_() for t in inputs)


# "rank" takes a whole accumulation window, which the check of accumulation compares; "global" is
# the option under which ranks equal one process.
CASES = {
    "SAM": ContractCase(
        args={"rho": RHO, "sharpness": "rank"},
        neutral={"rho": 0.0},
        bad=[{"rho": -0.1}, {"eta": -1.0}, {"sharpness": "all"}, {"steps": 0}],
        expected=_sam,
        joint={"sharpness": "global"},
    ),
    "AdversarialModelPerturbation": ContractCase(
        args={"epsilon": EPSILON, "sharpness": "rank"},
        neutral={"epsilon": 0.0},
        bad=[{"epsilon": -0.1}, {"inner_lr": -1.0}, {"sharpness": "all"}, {"steps": 0}],
        expected=_amp,
        gradcheck=_clipping,
        joint={"sharpness": "global"},
    ),
}
