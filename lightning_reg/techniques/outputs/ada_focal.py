"""Focal loss whose exponents follow how over- or underconfident held-out predictions are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.engine import ArgumentError, Paper, Schedule, Signals, Step
from lightning_reg.engine.criterion import as_distribution
from lightning_reg.engine.errors import check_range
from lightning_reg.mechanisms.held_out_feedback import HeldOutFeedback
from lightning_reg.mechanisms.labeled_output_penalty import confidence_and_correctness
from lightning_reg.mechanisms.loss_replacement import LossReplacement, Replaces

__all__ = ["AdaFocal", "ada_focal"]


def ada_focal(logits: Tensor, targets: Tensor, edges: Tensor, gammas: Tensor) -> Tensor:
    """The focal or inverse-focal loss of each row, with the exponent of the bin of ``p``.

    ``-(1 - p)^gamma log p`` where the bin's ``gamma`` is above 0, ``-(1 + p)^|gamma| log p`` where
    it is below; soft labels weight the terms of their classes.

    Args:
        logits: (N, C).
        targets: (N,) class indices, or (N, C) distributions.
        edges: (B - 1,) rising; bin b is ``[edges[b - 1], edges[b])``.
        gammas: (B,). The choice of the bin has no gradient.

    Returns:
        (N,), at least 0, in nats.
    """
    log_p = F.log_softmax(logits, dim=-1)
    share = as_distribution(targets, logits)
    # A class without a share costs nothing, whatever its probability.
    log_p = log_p.masked_fill(share == 0, 0.0)
    p = log_p.exp()
    bins = torch.bucketize(p.detach(), edges.to(p), right=True)
    gamma = gammas.to(p)[bins]
    rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(p.dtype).eps)
    base = torch.where(gamma > 0, rest, 1 + p)
    return -(share * base.pow(gamma.abs()) * log_p).sum(-1)


def next_gammas(
    gammas: Tensor,
    gaps: Tensor,
    rate: float = 1.0,
    lowest: float = -2.0,
    highest: float = 20.0,
    switch: float = 0.2,
) -> Tensor:
    """``gamma exp(lambda gap)`` above 0, ``gamma exp(-lambda gap)`` below.

    One whose size falls below ``switch`` changes its sign, and starts there on the other side.

    Args:
        gammas: (B,) the present ones.
        gaps: (B,) mean confidence minus accuracy of held-out predictions in each bin.
        rate: ``lambda``.
        lowest: the bound below.
        highest: the bound above.
        switch: the size at which focal and inverse-focal loss change places.
    """
    sign = torch.where(gammas > 0, 1.0, -1.0).to(gammas)
    moved = gammas * (sign * rate * gaps).exp()
    moved = torch.where(moved.abs() < switch, -sign * switch, moved)
    return moved.clamp(lowest, highest)


def equal_mass_gaps(confidence: Tensor, correctness: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    """Inner edges (B - 1,) of bins that hold equally many, and confidence minus accuracy (B,).

    Args:
        confidence: (N,).
        correctness: (N,).
        n_bins: B; an empty bin, between ties, has a gap of 0.
    """
    confidence, order = confidence.double().sort()
    position = torch.arange(1, n_bins, device=order.device) * len(order) / n_bins
    below = position.floor().long().clamp(max=len(order) - 1)
    above = (below + 1).clamp(max=len(order) - 1)
    edges = torch.lerp(confidence[below], confidence[above], (position - below).double())
    index = torch.bucketize(confidence, edges)
    difference = confidence - correctness.double()[order]
    counts = torch.bincount(index, minlength=n_bins)
    sums = torch.bincount(index, weights=difference, minlength=n_bins)
    return edges, sums / counts.clamp_min(1)


class AdaFocal(HeldOutFeedback, LossReplacement):
    """Focal loss whose exponents follow how over- or underconfident held-out predictions are.

    Ghosh, Schaaf, Gormley (2022), AdaFocal: Calibration-aware Adaptive Focal Loss,
    arXiv:2211.11838.

    Held-out confidences are sorted into 15 bins of equal mass. After each validation the exponent
    of a bin moves by its calibration gap, ``gamma_b <- gamma_b exp(lambda (conf_b - acc_b))``: up
    where predictions are too sure, which then learn less from sure samples, and down where they
    are not sure enough. One that falls below 0.2 turns to -0.2, the inverse-focal loss ``-(1 +
    p)^|gamma| log p``, which drives confidence up, and back. A training sample takes the exponent
    of the bin that its label's probability is in. See :func:`ada_focal`.

    Rule, bounds and defaults are those of the released code (3mcloud/adafocal, losses/adafocal.py,
    utils/metrics.py): ``lambda`` 1, all exponents 1 at first, within [-2, 20]. It sums over the
    batch, here it is the mean.

    Args:
        strength: the share of the new loss, in [0, 1]; the rest stays the cross-entropy.
        n_bins: the number of bins, from 2.
        rate: ``lambda``, at least 0.
        gamma: all exponents before the first validation; not 0.
        lowest: their bound below, at most 0.
        highest: their bound above, above 0.
        switch: the size at which an exponent changes its sign, above 0.
        dataloader: held-out data; by default the first validation dataloader.
        replaces: ``"cross_entropy"`` if your loss is the cross-entropy, ``"term"`` if that is one
            of its terms, ``"loss"`` to drop whatever it is.
        signals: where ``logits`` and ``targets`` are; and ``inputs``, for held-out data, which go
            through ``self(inputs)``.
        name: the name in logs and checkpoints.

    Raises:
        ArgumentError: if an argument is outside its range.

    Note:
        Over ranks: global; a mean over samples, for which nothing is communicated, and after a
        validation the confidences of all ranks are gathered. Exponents and edges are saved. Cost:
        a log-softmax and a power over the logits, and one more forward pass over the held-out data
        after each validation. Without a validation the exponents stay where they are.

        It hurts where held-out data are few: fifteen bins of a few samples each move exponents by
        noise. What is used for it is no longer held out: test on other data.

    Example:
        >>> import lightning as L
        >>> from lightning_reg import AdaFocal
        >>> trainer = L.Trainer(callbacks=[AdaFocal()], logger=False)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "AdaFocal: Calibration-aware Adaptive Focal Loss", "Ghosh et al.", 2022, "2211.11838"
        ),
    )
    function: ClassVar[Callable[..., Any] | None] = staticmethod(ada_focal)
    explanation: ClassVar[str] = "weights samples by exponents that follow held-out calibration"

    def __init__(
        self,
        strength: float | Schedule = 1.0,
        *,
        n_bins: int = 15,
        rate: float = 1.0,
        gamma: float = 1.0,
        lowest: float = -2.0,
        highest: float = 20.0,
        switch: float = 0.2,
        dataloader: Any = None,
        replaces: Replaces = "cross_entropy",
        signals: Signals | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(strength, replaces=replaces, signals=signals, name=name)
        if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 2:
            raise ArgumentError(
                self, f"`n_bins` must be a whole number from 2, got {n_bins!r}", cure="AdaFocal()"
            )
        check_range(self, "rate", rate, 0, cure="AdaFocal(rate=1.0)")
        check_range(self, "lowest", lowest, None, 0, cure="AdaFocal(lowest=-2.0)")
        check_range(self, "highest", highest, 0, low_open=True, cure="AdaFocal(highest=20.0)")
        check_range(self, "switch", switch, 0, low_open=True, cure="AdaFocal(switch=0.2)")
        check_range(self, "gamma", gamma, lowest, highest, cure="AdaFocal(gamma=1.0)")
        if gamma == 0:
            raise ArgumentError(self, "`gamma` must not be 0, got 0", cure="AdaFocal(gamma=1.0)")
        self.n_bins = n_bins
        self.rate, self.lowest, self.highest, self.switch = rate, lowest, highest, switch
        self.dataloader = dataloader
        self.edges = torch.arange(1, n_bins, dtype=torch.float64) / n_bins
        self.gammas = torch.full((n_bins,), float(gamma), dtype=torch.float64)

    def losses(self, step: Step, logits: Tensor, distribution: Tensor) -> Tensor:
        """The loss of each row."""
        return ada_focal(logits, distribution, self.edges, self.gammas)

    def summary(self, logits: Tensor, distribution: Tensor) -> Tensor:
        """Confidence and correctness."""
        return torch.stack(confidence_and_correctness(logits, distribution), 1)

    def adjust(self, rows: Tensor) -> None:
        """Move the exponents by the gaps of their bins."""
        rows = rows[torch.isfinite(rows).all(1)].cpu()
        if len(rows) == 0:
            return
        self.edges, gaps = equal_mass_gaps(rows[:, 0], rows[:, 1], self.n_bins)
        bounds = (self.lowest, self.highest, self.switch)
        self.gammas = next_gammas(self.gammas, gaps, self.rate, *bounds)

    def state_dict(self) -> dict[str, Any]:
        """Edges and exponents."""
        return {"edges": self.edges, "gammas": self.gammas}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.edges, self.gammas = state_dict["edges"], state_dict["gammas"]
