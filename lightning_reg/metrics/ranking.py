"""Predictions ranked by confidence, and what is read from the ranking."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_reg.metrics.fine_histogram import Cells, OrderMetric

# From here on the asymptotic series of the harmonic numbers is exact to 1e-15.
_SERIES_FROM = 32.0


class Ranked(NamedTuple):
    """Predictions in order of falling confidence; those of a group are tied.

    Attributes:
        sizes: (n,) float, the predictions in each group.
        errors: (n,) the sum of their errors.
    """

    sizes: Tensor
    errors: Tensor

    @classmethod
    def of(cls, cells: Cells) -> Ranked:
        """The ranking of predictions that are grouped by confidence."""
        errors = (cells.sizes - cells.correct_sum).clamp_min(0)
        return cls(cells.sizes.flip(0), errors.flip(0))

    @property
    def total(self) -> Tensor:
        """The number of predictions."""
        return self.sizes.sum()

    @property
    def risk(self) -> Tensor:
        """(n,) the mean error of each group."""
        return self.errors / self.sizes

    def before(self) -> tuple[Tensor, Tensor]:
        """(n,) predictions and errors in the groups before each."""
        return self.sizes.cumsum(0) - self.sizes, self.errors.cumsum(0) - self.errors

    def sorted_within(self, errors_first: bool) -> Ranked:
        """The ranking with the errors of each group before, or after, its right predictions."""
        whole = self.errors.floor()
        part = self.errors - whole
        one = (part > 0).to(part)
        rest = self.sizes - whole - one
        sizes = torch.stack([whole, one, rest], 1)
        errors = torch.stack([whole, part, torch.zeros_like(part)], 1)
        if not errors_first:
            sizes, errors = sizes.flip(1), errors.flip(1)
        filled = sizes.flatten() > 0
        return Ranked(sizes.flatten()[filled], errors.flatten()[filled])


def harmonic_step(start: Tensor, length: Tensor) -> Tensor:
    """``H(start + length) - H(start)`` of the harmonic numbers ``H(k) = 1 + 1/2 + ... + 1/k``."""
    end = start + length
    late = start >= _SERIES_FROM
    few, many = torch.where(late, 0.0, start), torch.where(late, start, _SERIES_FROM)
    small = torch.digamma(few + length + 1) - torch.digamma(few + 1)
    last = torch.where(late, end, many + length)
    return torch.where(late, torch.log1p(length / many) + _tail(last) - _tail(many), small)


def _tail(k: Tensor) -> Tensor:
    square = k.square().reciprocal()
    series = (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240))) * square
    return 0.5 / k - series


def area_under_risk(ranked: Ranked) -> Tensor:
    """The mean over k of the risk of the first k; of tied ones, over all their orders."""
    sizes, risk = ranked.sizes, ranked.risk
    seen, wrong = ranked.before()
    # Among the first k of a tied group k * risk are wrong on average.
    inside = sizes * risk + (wrong - seen * risk) * harmonic_step(seen, sizes)
    return inside.sum() / ranked.total


def least_area_under_risk(ranked: Ranked) -> Tensor:
    """The same for the best order, all errors last."""
    wrong, total = ranked.errors.sum(), ranked.total
    right = total - wrong
    return (wrong - right * harmonic_step(right, wrong)) / total


def area_under_generalized_risk(ranked: Ranked) -> Tensor:
    """The area under the share of all predictions that are accepted and wrong."""
    _, wrong = ranked.before()
    return (ranked.sizes * (wrong + ranked.errors / 2)).sum() / ranked.total.square()


def risk_of_first(ranked: Ranked, accepted: Tensor) -> Tensor:
    """The mean risk of the first ``accepted`` predictions, (k,) for (k,)."""
    ends = ranked.sizes.cumsum(0)
    group = torch.searchsorted(ends, accepted).clamp_max(len(ends) - 1)
    seen, wrong = (values[group] for values in ranked.before())
    return (wrong + (accepted - seen) * ranked.risk[group]) / accepted


def largest_coverage(ranked: Ranked, risk: float) -> Tensor:
    """The largest share whose risk is at most ``risk``; 0 if there is none."""
    ends = ranked.sizes.cumsum(0)
    allowed = (ranked.errors.cumsum(0) / ends <= risk).nonzero().flatten()
    group = int(allowed[-1]) + 1 if len(allowed) else 0
    if group == len(ends):
        return torch.ones_like(ends[0])
    seen, wrong = (values[group] for values in ranked.before())
    # Within a group the risk moves one way only: its end is too risky, so it rises.
    more = ((risk * seen - wrong) / (ranked.risk[group] - risk)).floor().clamp_min(0)
    more = _corrected(ranked, seen + more, risk) if float(seen + more) else seen
    return more / ranked.total


def _corrected(ranked: Ranked, accepted: Tensor, risk: float) -> Tensor:
    """``accepted``, one more or one less: the quotient that it comes from was rounded."""
    near = accepted + torch.tensor([1.0, 0.0, -1.0]).to(accepted)
    near = near[(near >= 1) & (near <= ranked.total)]
    fits = near[risk_of_first(ranked, near) <= risk]
    return fits[0] if len(fits) else accepted - 1


class SelectiveMetric(OrderMetric):
    """Base of what is read from the ranking of predictions by confidence."""

    view = "top_label"
    plot_upper_bound = 1.0

    def read(self, ranked: Ranked) -> Tensor:
        """The metric of ranked predictions."""
        raise NotImplementedError

    def statistic(self, cells: Cells) -> Tensor:
        """The metric, averaged over the orders of tied predictions."""
        return self.read(Ranked.of(cells))

    def bound(self, cells: Cells) -> Tensor:
        """The metric lies between those with each cell's errors first and last."""
        ranked = Ranked.of(cells)
        value = self.read(ranked)
        ends = [self.read(ranked.sorted_within(first)) for first in (True, False)]
        return torch.stack([(end - value).abs() for end in ends]).max()

    def curve(self) -> tuple[Tensor, Tensor]:
        """Coverage and the risk of the accepted, at the end of each cell; drawn by ``plot``."""
        ranked = Ranked.of(self.cells())
        accepted = ranked.sizes.cumsum(0)
        return accepted / ranked.total, ranked.errors.cumsum(0) / accepted

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Risk against coverage, drawn from the state.

        Args:
            val: a coverage and risk pair of tensors to draw in place of the state's.
            ax: a matplotlib axes to draw into; a new figure without.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from lightning_reg.metrics.order_figures import draw_risk_coverage

        return draw_risk_coverage(*(self.curve() if val is None else val), ax=ax)
