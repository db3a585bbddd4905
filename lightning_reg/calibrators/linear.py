"""Softmax regression from held-out logits, shared by the calibrators that are linear in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_reg.calibrators.calibrator import one_hot
from lightning_reg.calibrators.temperature import solve_temperature
from lightning_reg.engine.communicator import Communicator
from lightning_reg.engine.optional import require

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


def minimize(
    owner: object,
    objective: Objective,
    start: Tensor,
    bounds: list[tuple[float | None, float | None]] | None = None,
) -> Tensor:
    """The minimum of a smooth convex function, by SciPy's L-BFGS-B, to a gradient of 1e-9.

    Args:
        owner: who needs SciPy.
        objective: value and gradient at a float64 vector.
        start: the first vector; gives the device.
        bounds: of each number.
    """
    optimize = require("scipy.optimize", "calibration", type(owner).__name__)

    def both(x: Any) -> tuple[float, Any]:
        value, gradient = objective(torch.from_numpy(x.copy()).to(start))
        return float(value), gradient.cpu().numpy()

    limits = {"maxiter": 20_000, "maxfun": 100_000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}
    found = optimize.minimize(
        both, start.cpu().numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=limits
    )
    return torch.from_numpy(found.x).to(start)


def cross_entropy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy in nats, and its gradient by the outputs (N, C)."""
    log_p = outputs.log_softmax(1)
    distribution = one_hot(targets, outputs)
    mass = distribution.sum(1, keepdim=True)
    value = -(distribution * log_p).sum() / len(outputs)
    return value, (mass * log_p.exp() - distribution) / len(outputs)


def best_scale(owner: object, features: Tensor, targets: Tensor) -> Tensor:
    """What to multiply features by before a fit: 1 / T, or the inverse of their largest spread."""
    inverse, outcome = solve_temperature(owner, features, targets, Communicator())
    if outcome == "inverted":
        spread = features.amax(1) - features.amin(1) if features.ndim == 2 else features.abs()
        inverse = 1 / float(spread.max())
    return features.new_tensor(inverse)


def fit_matrix(
    owner: object, features: Tensor, targets: Tensor, off_diagonal: float, bias: float
) -> tuple[Tensor, Tensor]:
    """``W`` (C, C) and ``b`` (C,) of ``softmax(W x + b)`` with regularized off-diagonal and bias.

    The minimum of the mean cross-entropy plus ``lambda / (k (k - 1)) sum_{i != j} w_ij^2`` plus
    ``mu / k sum_i b_i^2``.

    Args:
        owner: who needs SciPy.
        features: (N, C).
        targets: (N,) class indices or (N, C) distributions.
        off_diagonal: ``lambda``.
        bias: ``mu``.
    """
    classes = features.shape[1]
    scale = best_scale(owner, features, targets)
    # From their means: offsets and weights would otherwise trade places along narrow valleys.
    centre = features.mean(0) * scale
    x = features * scale - centre
    off = 1 - torch.eye(classes, dtype=x.dtype, device=x.device)
    # The weights of scaled features are W / scale.
    weight_rate = off_diagonal / (classes * (classes - 1)) * scale.square() * off
    bias_rate = bias / classes

    def objective(parameters: Tensor) -> tuple[Tensor, Tensor]:
        w, shifted = parameters[:-classes].view(classes, classes), parameters[-classes:]
        b = shifted - w @ centre
        value, by_output = cross_entropy(x @ w.T + shifted, targets)
        value = value + (weight_rate * w.square()).sum() + bias_rate * b.square().sum()
        by_b = 2 * bias_rate * b
        by_w = by_output.T @ x + 2 * weight_rate * w - torch.outer(by_b, centre)
        return value, torch.cat([by_w.reshape(-1), by_output.sum(0) + by_b])

    start = torch.cat([(1 - off).reshape(-1), centre])
    found = minimize(owner, objective, start)
    weight, shifted = found[:-classes].view(classes, classes), found[-classes:]
    return weight * scale, shifted - weight @ centre
