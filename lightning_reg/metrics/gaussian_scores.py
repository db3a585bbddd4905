"""Proper scores of Gaussian predictions, and how sharp the predictions are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.regression import GaussianMean, Gaussians, ScaleIs

__all__ = ["GaussianCRPS", "GaussianNLL", "Sharpness", "gaussian_crps", "gaussian_nll", "sharpness"]


def gaussian_crps(
    mean: Tensor, scale: Tensor, target: Tensor, *, scale_is: ScaleIs, validate_args: bool = True
) -> Tensor:
    r"""The continuous ranked probability score of Gaussian predictions, in units of the target.

    The mean of ``∫ (F(x) - 1[y <= x])^2 dx``, which is for ``F = N(mu, sigma^2)`` and
    ``z = (y - mu) / sigma``

        sigma (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))

    It falls to the absolute error as ``sigma`` goes to 0. Equal to ``properscoring.crps_gaussian``
    and ``uncertainty_toolbox.crps_gaussian``. ``torchmetrics``'
    ``ContinuousRankedProbabilityScore`` scores an ensemble of draws and not a distribution: it
    only comes near this value, as the ensemble grows.

    Args:
        mean: (N, ...) predicted means.
        scale: (N, ...) standard deviations or variances, above 0.
        target: (N, ...) what was observed.
        scale_is: ``"std"`` or ``"variance"``; never guessed.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if shapes differ, or a scale is not above 0.

    Example:
        >>> import torch
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> gaussian_crps(zero, one, zero, scale_is="std")  # (sqrt(2) - 1) / sqrt(pi)
        tensor(0.2337, dtype=torch.float64)
    """
    metric = GaussianCRPS(scale_is=scale_is, validate_args=validate_args)
    value: Tensor = evaluate(metric, mean, scale, target)
    return value


def gaussian_nll(
    mean: Tensor, scale: Tensor, target: Tensor, *, scale_is: ScaleIs, validate_args: bool = True
) -> Tensor:
    r"""The mean of ``-log N(y; mu, sigma^2) = log(2 pi sigma^2) / 2 + (y - mu)^2 / (2 sigma^2)``.

    In nats, with the constant. ``torch.nn.functional.gaussian_nll_loss`` leaves the constant out
    unless ``full=True``, and raises small variances to 1e-6: right for a loss, not for a score,
    which it makes better than it is for a model that is too sure. Nothing is clamped here.

    Args:
        mean: (N, ...) predicted means.
        scale: (N, ...) standard deviations or variances, above 0.
        target: (N, ...) what was observed.
        scale_is: ``"std"`` or ``"variance"``; never guessed.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if shapes differ, or a scale is not above 0.

    Example:
        >>> import torch
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> gaussian_nll(zero, one, zero, scale_is="variance")  # log(2 pi) / 2
        tensor(0.9189, dtype=torch.float64)
    """
    metric = GaussianNLL(scale_is=scale_is, validate_args=validate_args)
    value: Tensor = evaluate(metric, mean, scale, target)
    return value


def sharpness(
    mean: Tensor, scale: Tensor, target: Tensor, *, scale_is: ScaleIs, validate_args: bool = True
) -> Tensor:
    """How narrow predictions are: ``sqrt(mean of sigma^2)``, in units of the target.

    The square root of the mean variance, as in ``uncertainty_toolbox.sharpness``; Kuleshov et al.
    (2018), who named it for regression, give the mean variance itself. Sharpness says nothing
    about being right: read it beside a calibration error.

    Args:
        mean: (N, ...) predicted means; only their shape and whether they are finite count.
        scale: (N, ...) standard deviations or variances, above 0.
        target: (N, ...) what was observed; likewise.
        scale_is: ``"std"`` or ``"variance"``; never guessed.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if shapes differ, or a scale is not above 0.

    Example:
        >>> import torch
        >>> variance = torch.tensor([9.0, 1.0])
        >>> sharpness(torch.zeros(2), variance, torch.zeros(2), scale_is="variance")
        tensor(2.2361, dtype=torch.float64)
    """
    metric = Sharpness(scale_is=scale_is, validate_args=validate_args)
    value: Tensor = evaluate(metric, mean, scale, target)
    return value


class GaussianCRPS(GaussianMean):
    """The continuous ranked probability score of Gaussian predictions.

    Gneiting & Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, 2007. See
    :func:`gaussian_crps` for the closed form. The state is a float64 sum (float32 on MPS) and an
    int64 count.

    Args:
        scale_is: whether ``update`` gets the ``"std"`` or the ``"variance"``.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import GaussianCRPS
        >>> metric = GaussianCRPS(scale_is="std")
        >>> metric.update(torch.zeros(1), torch.ones(1), torch.zeros(1))
        >>> metric.compute()
        tensor(0.2337, dtype=torch.float64)
    """

    function = staticmethod(gaussian_crps)
    higher_is_better = False
    plot_lower_bound = 0.0

    def values(self, given: Gaussians) -> Tensor:
        """The score of each prediction."""
        z = (given.target - given.mean) / given.std
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        centered = z * torch.erf(z / math.sqrt(2))
        return given.std * (centered + 2 * density - 1 / math.sqrt(math.pi))


class GaussianNLL(GaussianMean):
    """The negative log-likelihood of Gaussian predictions, in nats, with its constant.

    See :func:`gaussian_nll`. The state is a float64 sum (float32 on MPS) and an int64 count.

    Args:
        scale_is: whether ``update`` gets the ``"std"`` or the ``"variance"``.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import GaussianNLL
        >>> metric = GaussianNLL(scale_is="variance")
        >>> metric.update(torch.zeros(1), torch.ones(1), torch.zeros(1))
        >>> metric.compute()
        tensor(0.9189, dtype=torch.float64)
    """

    function = staticmethod(gaussian_nll)
    higher_is_better = False

    def values(self, given: Gaussians) -> Tensor:
        """The negative log-likelihood of each target."""
        z = (given.target - given.mean) / given.std
        return given.std.log() + (z.square() + math.log(2 * math.pi)) / 2


class Sharpness(GaussianMean):
    """How narrow Gaussian predictions are: the root of their mean variance.

    See :func:`sharpness`. The state is a float64 sum (float32 on MPS) and an int64 count.

    Args:
        scale_is: whether ``update`` gets the ``"std"`` or the ``"variance"``.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import Sharpness
        >>> metric = Sharpness(scale_is="std")
        >>> metric.update(torch.zeros(2), torch.tensor([3.0, 1.0]), torch.zeros(2))
        >>> metric.compute()
        tensor(2.2361, dtype=torch.float64)
    """

    function = staticmethod(sharpness)
    higher_is_better = False
    plot_lower_bound = 0.0

    def values(self, given: Gaussians) -> Tensor:
        """The variance of each prediction."""
        return given.std.square()

    def value(self) -> Any:
        """The root of the mean variance."""
        return super().value().sqrt()
