"""Replaces a probability with the share of positives among held-out ones in its bin."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_reg.calibrators.calibrator import logit
from lightning_reg.calibrators.one_vs_rest import OneVsRest
from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.inputs import Task

__all__ = ["HistogramBinning"]

Binning = Literal["equal_mass", "equal_width"]
_BINNINGS = ("equal_mass", "equal_width")


class HistogramBinning(OneVsRest):
    """Replaces a probability with the share of positives among held-out ones in its bin.

    Zadrozny, Elkan (2001), Obtaining calibrated probability estimates from decision trees and
    naive Bayesian classifiers (ICML).

    Bins are ``[e_i, e_(i+1))``, the last one closed; ``q = (sum of targets in the bin) / (their
    number)``, which is the squared-error optimum among functions that are constant on the bins.
    ``"equal_mass"`` bins hold equally many held-out samples but for ties, as in the paper;
    ``"equal_width"`` ones are those of most libraries. A bin that is empty takes its middle. For
    several classes, each against the others, divided by the sum.

    Args:
        n_bins: the number of bins, at least 1. 15 as in Guo et al. (2017); the first paper has 10.
        binning: ``"equal_mass"`` or ``"equal_width"``.
        task: ``"multiclass"`` or ``"binary"``.
        ignore_index: positions with this label are left out of the fit.
        class_dim: the dimension of the classes: -1 for token logits (B, T, C).

    Raises:
        ArgumentError: if ``n_bins`` or ``binning`` is none of these.

    Note:
        Over ranks: the held-out logits are gathered once, to every rank, in float64; every rank
        ends with rank 0's result, which does not depend on the number of ranks. Cost: a sort per
        class.

        It hurts where the order of predictions matters: within a bin all are equal, and the
        predicted class can change. Probabilities of 0 stay 2^-52 away from it.

    Example:
        >>> import torch
        >>> from lightning_reg import HistogramBinning
        >>> logits, labels = torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.tensor([1, 1, 0, 0])
        >>> scaling = HistogramBinning(2, binning="equal_width", task="binary").fit(logits, labels)
        >>> scaling.probabilities(torch.tensor([2.0]))
        tensor([0.6667])
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "Obtaining calibrated probability estimates from decision trees and naive Bayesian "
            "classifiers",
            "Zadrozny and Elkan",
            2001,
            None,
        ),
    )
    edges: Tensor
    values: Tensor

    def __init__(
        self,
        n_bins: int = 15,
        *,
        binning: Binning = "equal_mass",
        task: Task = "multiclass",
        ignore_index: int | None = None,
        class_dim: int = 1,
    ) -> None:
        super().__init__(task=task, ignore_index=ignore_index, class_dim=class_dim)
        if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
            raise ArgumentError(
                self, f"`n_bins` must be a whole number from 1, got {n_bins!r}", cure="n_bins=15"
            )
        if binning not in _BINNINGS:
            raise ArgumentError(
                self,
                f"`binning` must be one of {', '.join(_BINNINGS)}, got {binning!r}",
                cure='HistogramBinning(binning="equal_mass")',
            )
        self.n_bins = n_bins
        self.binning = binning
        # (C, n_bins + 1) and (C, n_bins).
        self.register_buffer("edges", torch.zeros(1, 2, dtype=torch.float64))
        self.register_buffer("values", torch.zeros(1, 1, dtype=torch.float64))

    def solve_column(self, log_odds: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Edges and means."""
        p = log_odds.sigmoid()
        edges = torch.linspace(0, 1, self.n_bins + 1, dtype=p.dtype, device=p.device)
        if self.binning == "equal_mass":
            edges = _quantiles(p, edges)
        index = _bin(p, edges)
        counts = torch.bincount(index, minlength=self.n_bins)
        sums = torch.bincount(index, weights=targets, minlength=self.n_bins)
        middle = (edges[1:] + edges[:-1]) / 2
        return {"edges": edges, "values": torch.where(counts > 0, sums / counts, middle)}

    def map_column(self, log_odds: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        """The bin's log-odds."""
        return logit(numbers["values"][_bin(log_odds.sigmoid(), numbers["edges"])])


def _bin(p: Tensor, edges: Tensor) -> Tensor:
    return torch.bucketize(p.contiguous(), edges[1:-1].contiguous(), right=True)


def _quantiles(p: Tensor, levels: Tensor) -> Tensor:
    """Edges halfway between the samples that they part, from 0 to 1."""
    p = p.sort().values
    first = (levels[1:-1] * len(p)).round().long().clamp(1, len(p) - 1 if len(p) > 1 else 1)
    inner = (p[first - 1] + p[first.clamp_max(len(p) - 1)]) / 2
    return torch.cat([p.new_zeros(1), inner, p.new_ones(1)])
