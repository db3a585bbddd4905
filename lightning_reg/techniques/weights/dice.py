"""An activation whose bend follows the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dice", "dice"]


def dice(s: Tensor, alpha: Tensor, mean: Tensor, variance: Tensor, eps: float = 1e-8) -> Tensor:
    """``p s + (1 - p) alpha s`` with ``p = sigmoid((s - mean) / sqrt(variance + eps))``.

    Args:
        s: (B, d).
        alpha: (d,), the slope of units that are off.
        mean: (d,).
        variance: (d,).
        eps: keeps a constant unit finite.

    Returns:
        (B, d).
    """
    p = torch.sigmoid((s - mean) * torch.rsqrt(variance + eps))
    return p * s + (1 - p) * alpha * s


class Dice(nn.Module):
    """An activation whose bend follows the data (the data adaptive activation of DIN).

    Zhou et al. (2017), Deep Interest Network for Click-Through Rate Prediction, arXiv:1706.06978.

    ``f(s) = p(s) s + (1 - p(s)) alpha s`` with ``p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + eps))``:
    a PReLU that bends where the batch's mean is, and softly. ``alpha`` is learned for each unit.
    Mean and variance are the batch's while training, and running ones, as of a BatchNorm, in
    evaluation.

    Confirmed against zhougr1993/DeepInterestNetwork@b46a273, din/Dice.py, which has a learned
    factor of the normalized value besides, that starts at 0 and is not in the paper; here it is 1.
    ``alpha`` starts at 0 as there, and ``eps`` is the paper's 1e-8, from memory.

    Args:
        units: ``d``.
        eps: keeps a constant unit finite.
        momentum: of the running statistics, as in ``nn.BatchNorm1d``.

    Note:
        Statistics are those of the rank's batch; ``SyncBatchNorm.convert_sync_batchnorm`` (or
        ``Trainer(sync_batchnorm=True)``) makes them those of all ranks.

    Example:
        >>> from lightning_reg.techniques.weights.dice import Dice
        >>> Dice(3)(torch.randn(8, 3)).shape
        torch.Size([8, 3])
    """

    def __init__(self, units: int, eps: float = 1e-8, momentum: float = 0.1) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(units))
        # It normalizes and nothing else: what a conversion to SyncBatchNorm looks for.
        self.norm = nn.BatchNorm1d(units, eps=eps, momentum=momentum, affine=False)

    def forward(self, s: Tensor) -> Tensor:
        """(B, d) to (B, d)."""
        p = torch.sigmoid(self.norm(s))
        return p * s + (1 - p) * self.alpha * s
