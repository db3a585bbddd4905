"""Self-distillation of ridge regressions in closed form; the technique trains networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["kernel_self_distillation", "ridge_self_distillation"]


def kernel_self_distillation(
    kernel: Tensor, targets: Tensor, ridge: float, alphas: Sequence[float]
) -> Tensor:
    """Every generation of self-distillation in kernel ridge regression, in closed form.

    ``c_{t+1} = (K + lambda I)^-1 (alpha_t y + (1 - alpha_t) f_t)`` with fits ``f_t = K c_t`` and
    ``f_0 = y``. At a constant ``alpha`` above 0 they converge to the ridge regression with
    ``lambda / alpha``; at 0 to zero.

    Args:
        kernel: (N, N) ``K``, symmetric and positive semi-definite.
        targets: (N, k) or (N,) ``y``.
        ridge: ``lambda``, above 0.
        alphas: ``alpha_1, alpha_2, ...``: the weights of the labels.

    Returns:
        (T + 1, N, k) or (T + 1, N) coefficients ``c_t``; a prediction is ``k(x) @ c_t``.
    """
    eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor = torch.linalg.cholesky(kernel + ridge * eye)
    columns = targets.reshape(len(targets), -1).to(kernel)
    found = [torch.cholesky_solve(columns, factor)]
    for alpha in alphas:
        mixture = torch.lerp(kernel @ found[-1], columns, float(alpha))
        found.append(torch.cholesky_solve(mixture, factor))
    return torch.stack(found).view(-1, *targets.shape)


def ridge_self_distillation(
    features: Tensor, targets: Tensor, ridge: float, alphas: Sequence[float]
) -> Tensor:
    """Every generation of self-distillation in linear ridge regression, in closed form.

    Args as in :func:`kernel_self_distillation`, for ``K = X X^T``; ``features`` (N, d) is ``X``.

    Returns:
        (T + 1, d, k) or (T + 1, d) the weights ``w_t = X^T c_t``.
    """
    coefficients = kernel_self_distillation(features @ features.T, targets, ridge, alphas)
    columns = coefficients.view(len(coefficients), len(features), -1)
    weights = features.T @ columns
    return weights.view(len(coefficients), features.shape[1], *targets.shape[1:])
