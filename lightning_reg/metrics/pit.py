"""The probability integral transform of Gaussian predictions, as a histogram."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.inputs import high_precision
from lightning_reg.metrics.regression import GaussianMetric, Gaussians, ScaleIs

Discrepancy = Literal["l1", "chi2", "ks"]
DISCREPANCIES = ("l1", "chi2", "ks")

__all__ = ["PITHistogram", "pit_discrepancy"]


def pit_discrepancy(
    mean: Tensor,
    scale: Tensor,
    target: Tensor,
    *,
    scale_is: ScaleIs,
    n_bins: int = 20,
    discrepancy: Discrepancy = "l1",
    validate_args: bool = True,
) -> Tensor:
    r"""How far the probability integral transform is from uniform.

    ``u = Phi((y - mu) / sigma)`` is uniform if the predictions are calibrated. With ``f_b`` the
    share of bin b of B equal ones, the last one closed:

    - ``"l1"``: ``sum_b |f_b - 1/B|``, the reliability index of Delle Monache et al. (2006)
    - ``"chi2"``: ``B sum_b (f_b - 1/B)^2``, the chi-square statistic over N: times N it is
      ``scipy.stats.chisquare`` of the counts
    - ``"ks"``: the largest ``|F(b/B) - b/B|``, Kolmogorov-Smirnov at the bins' edges: at most
      1/B below the statistic of the sample itself

    A heap in the middle says the predictions are too wide, one at both ends too narrow, one at
    one end biased.

    Args:
        mean: (N, ...) predicted means.
        scale: (N, ...) standard deviations or variances, above 0.
        target: (N, ...) what was observed.
        scale_is: ``"std"`` or ``"variance"``; never guessed.
        n_bins: the number of bins.
        discrepancy: ``"l1"``, ``"chi2"`` or ``"ks"``.
        validate_args: check values, which costs a host sync.

    Returns:
        A float64 scalar (float32 on MPS); NaN if nothing counts.

    Raises:
        ArgumentError: if an argument, a shape or a value is not one of these.

    Example:
        >>> import torch
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> pit_discrepancy(zero, one, torch.tensor([-1.0, 1.0]), scale_is="std", n_bins=2)
        tensor(0., dtype=torch.float64)
    """
    metric = PITHistogram(
        scale_is=scale_is, n_bins=n_bins, discrepancy=discrepancy, validate_args=validate_args
    )
    value: Tensor = evaluate(metric, mean, scale, target)
    return value


class PITHistogram(GaussianMetric):
    """The histogram of the probability integral transform, and how far it is from uniform.

    See :func:`pit_discrepancy`. The state is ``n_bins`` int64 counts. :meth:`histogram` gives the
    counts, :meth:`plot` draws them.

    Args:
        scale_is: whether ``update`` gets the ``"std"`` or the ``"variance"``.
        n_bins: the number of equal bins over [0, 1].
        discrepancy: what ``compute`` gives: ``"l1"``, ``"chi2"`` or ``"ks"``.
        validate_args: check values, which costs a host sync a batch.
        kwargs: those of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import PITHistogram
        >>> metric = PITHistogram(scale_is="std", n_bins=2)
        >>> metric.update(torch.zeros(2), torch.ones(2), torch.tensor([1.0, 2.0]))
        >>> metric.histogram().tolist(), float(metric.compute())
        ([0, 2], 1.0)
    """

    function = staticmethod(pit_discrepancy)
    higher_is_better = False
    plot_lower_bound = 0.0
    counts: Tensor

    def __init__(
        self,
        *,
        scale_is: ScaleIs,
        n_bins: int = 20,
        discrepancy: Discrepancy = "l1",
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(scale_is=scale_is, validate_args=validate_args, **kwargs)
        if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 2:
            raise ArgumentError(
                self, f"`n_bins` must be a whole number from 2, got {n_bins!r}", cure="n_bins=20"
            )
        if discrepancy not in DISCREPANCIES:
            raise ArgumentError(
                self,
                f"`discrepancy` must be one of {', '.join(DISCREPANCIES)}, got {discrepancy!r}",
                cure='discrepancy="l1"',
            )
        self.n_bins = n_bins
        self.discrepancy: Discrepancy = discrepancy
        self.add_count("counts", n_bins)

    def accumulate(self, given: Gaussians) -> None:
        """Add the block's counts."""
        transform = torch.special.ndtr((given.target - given.mean) / given.std)
        index = (transform * self.n_bins).long().clamp_max(self.n_bins - 1)
        self.counts = self.counts.index_add(0, index, torch.ones_like(index))

    def histogram(self) -> Tensor:
        """(n_bins,) int64: of this process, or of all within ``sync_context()``."""
        return self.counts

    def value(self) -> Tensor:
        """The discrepancy over everything that was counted."""
        excess = high_precision(self.counts) / self.counts.sum() - 1 / self.n_bins
        if self.discrepancy == "l1":
            return excess.abs().sum()
        if self.discrepancy == "chi2":
            return self.n_bins * excess.square().sum()
        return excess.cumsum(0).abs().max()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """The histogram with the uniform line, drawn from the state.

        Args:
            val: counts (n_bins,) to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.regression_figures import draw_pit

        return draw_pit(self.counts if val is None else val, ax=ax)
