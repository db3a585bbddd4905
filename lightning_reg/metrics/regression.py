"""What the metrics of regression share: how a Gaussian prediction is given and read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import AdditiveMetric
from lightning_reg.metrics.blocks import split_alike
from lightning_reg.metrics.inputs import high_precision

ScaleIs = Literal["std", "variance"]
SCALES = ("std", "variance")


class Gaussians(NamedTuple):
    """Predictions of a normal distribution each, in high precision.

    Attributes:
        mean: (N,).
        std: (N,), above 0.
        target: (N,), what was observed.
    """

    mean: Tensor
    std: Tensor
    target: Tensor


class GaussianMetric(AdditiveMetric):
    """Base of metrics over predicted means and spreads.

    A subclass adds a block to its states in :meth:`accumulate`. Batches are read in blocks, so
    that no float64 copy of a dense prediction is made.

    Args:
        scale_is: whether the second argument of ``update`` is the ``"std"`` or the
            ``"variance"``; never guessed.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.
    """

    def __init__(self, *, scale_is: ScaleIs, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if scale_is not in SCALES:
            raise ArgumentError(
                self,
                f"`scale_is` must be one of {', '.join(SCALES)}, got {scale_is!r}: it is never "
                "guessed",
                cure='scale_is="std"',
            )
        self.scale_is: ScaleIs = scale_is
        self.validate_args = validate_args

    def accumulate(self, given: Gaussians) -> None:
        """Add a block to the states, out of place."""
        raise NotImplementedError

    def update(self, mean: Tensor, scale: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            mean: (N, ...) predicted means.
            scale: (N, ...) predicted standard deviations or variances, as ``scale_is`` says.
            target: (N, ...) what was observed.

        Raises:
            ArgumentError: if shapes differ, or a scale is not above 0.
        """
        for (mean_, scale_, target_), invalid in finite_blocks(
            self, {"mean": mean, "scale": scale, "target": target}
        ):
            self.invalid = self.invalid + invalid
            if self.validate_args and len(scale_) and float(scale_.min()) <= 0:
                raise ArgumentError(
                    self,
                    f"a {self.scale_is} must be above 0, got {float(scale_.min()):.4g}",
                    cure=f"metric.update(mean, {self.scale_is}.clamp_min(1e-6), target)",
                )
            std = scale_.sqrt() if self.scale_is == "variance" else scale_
            self.accumulate(Gaussians(mean_, std, target_))


class GaussianMean(GaussianMetric):
    """Base of metrics that are the mean of one number per Gaussian prediction.

    A subclass supplies :meth:`values`. NaN before anything was counted.
    """

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_total("total")
        self.add_count("count")

    def values(self, given: Gaussians) -> Tensor:
        """One number per prediction (N,)."""
        raise NotImplementedError

    def accumulate(self, given: Gaussians) -> None:
        """Add the block's sum and count."""
        values = self.values(given)
        self.total = self.total + values.sum().to(self.total)
        self.count = self.count + values.numel()

    def value(self) -> Tensor:
        """The mean over everything that was counted."""
        return self.total / self.count


def finite_blocks(
    owner: object, given: dict[str, Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Tensors of one shape as rows in high precision, block by block, without NaN and infinity.

    Yields:
        The rows that are finite in all tensors, and how many were not.
    """
    tensors = [t.detach() for t in given.values()]
    if len({t.shape for t in tensors}) != 1 or tensors[0].ndim < 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
        raise ArgumentError(
            owner,
            f"needs tensors of one shape (N, ...), got {shapes}",
            cure=f"metric.update({', '.join(f'{name}.squeeze(-1)' for name in given)})",
        )
    if not tensors[0].is_floating_point():
        name = next(iter(given))
        raise ArgumentError(
            owner, f"`{name}` must hold floats, got {tensors[0].dtype}", cure=f"{name}.float()"
        )
    for block in split_alike(tensors, tensors[0].ndim):
        rows = torch.stack([high_precision(t).reshape(-1) for t in block])
        finite = torch.isfinite(rows).all(0)
        yield tuple(rows[:, finite]), (~finite).sum()
