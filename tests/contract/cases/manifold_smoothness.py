"""Contract settings of penalties between neighbouring samples."""

import torch

from lightning_reg.techniques.gradients.manifold_lipschitz_dual import manifold_laplacian
from lightning_reg.testing import ContractCase


def _expected(probe):
    ones = torch.ones(len(probe.inputs), dtype=probe.logits.dtype)
    return manifold_laplacian(probe.inputs, probe.logits.softmax(1), ones, 4.0).mean()


def _inputs():
    generator = torch.Generator().manual_seed(0)
    x, f = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    weights = torch.rand(5, dtype=torch.float64, generator=generator)
    return (lambda f: manifold_laplacian(x, f, weights, 0.7)), (f.requires_grad_(),)


CASES = {
    "ManifoldLipschitzDual": ContractCase(
        args={"strength": 5.0, "bandwidth": 4.0, "loss_level": 0.5, "loss_step": 0.1},
        neutral={"strength": 0.0},
        bad=[
            {"strength": -1.0},
            {"bandwidth": 0.0},
            {"dual_step": -1.0},
            {"loss_step": -1.0},
            {"loss_limit": 0.5},
            {"loss_level": float("nan")},
            {"num_samples": 0},
        ],
        expected=_expected,
        gradcheck=_inputs,
        logs=("reg/manifold_lipschitz_dual", "reg/manifold_lipschitz_dual_slope"),
    ),
}
