"""Steps of second order."""

import torch
import torch.nn.functional as F

from lightning_reg.techniques.gradients.exact_gauss_newton import exact_gauss_newton
from lightning_reg.testing import ContractCase


def _predicted_fall(probe):
    """``-(g d + d^T H d / 2)`` for the dense Gauss-Newton matrix ``H``."""
    weights = [w for w in probe.module.parameters() if w.requires_grad]

    def rows(values):
        found = []
        for value in values:
            parts = torch.autograd.grad(value, weights, retain_graph=True)
            found.append(torch.cat([p.flatten() for p in parts]))
        return torch.stack(found)

    jacobian, (gradient,) = rows(probe.logits.flatten()), rows([probe.loss])
    logits = probe.logits.detach().flatten()
    targets = probe.targets
    loss = lambda z: F.cross_entropy(z.view(-1, 4), targets)  # noqa: E731
    matrix = jacobian.T @ torch.func.hessian(loss)(logits) @ jacobian
    direction = -torch.linalg.solve(matrix + torch.eye(len(matrix)).double(), gradient)
    return -(gradient @ direction + direction @ matrix @ direction / 2)


def _step():
    generator = torch.Generator().manual_seed(0)
    j = torch.randn(2, 2, 5, dtype=torch.float64, generator=generator).requires_grad_()
    q = torch.randn(2, 2, 2, dtype=torch.float64, generator=generator)
    q = (q @ q.mT).requires_grad_()
    r = torch.randn(2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    return exact_gauss_newton, (j, q, r, 0.5)


CASES = {
    "ExactGaussNewton": ContractCase(
        args={"adapt": True, "line_search": 2, "momentum": 0.5},
        neutral={"strength": 0.0},
        bad=[
            {"strength": 1.5},
            {"damping": 0.0},
            {"momentum": 1.0},
            {"line_search": -1},
            {"line_search": 1.5},
        ],
        bad_late=[{"network": "nowhere"}],
        expected=_predicted_fall,
        gradcheck=_step,
    ),
}
