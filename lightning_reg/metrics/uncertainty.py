"""How far a calibration error can be trusted, from its bins alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_reg.engine.errors import ArgumentError, check_range
from lightning_reg.engine.optional import require
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.binned import BinnedMetric
from lightning_reg.metrics.binning import BinMoments, ReliabilityBins
from lightning_reg.metrics.inputs import Rows, high_precision
from lightning_reg.metrics.readings import NORMS, Norm, error_of_bins

__all__ = ["CalibrationUncertainty", "calibration_uncertainty"]


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    estimate: float
    lower: float
    upper: float


def accuracy_band(bins: ReliabilityBins, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The Clopper-Pearson interval of the share of right answers in each bin.

    It covers the true share with at least the given probability in each bin, whatever the share
    and however few the predictions, given how many fell into the bin.

    Args:
        bins: what was counted, with labels: soft targets are no binomial counts.
        level: of confidence, for each bin by itself.

    Returns:
        Its ends, each of the shape of the counts; 0 and 1 in an empty bin.

    Raises:
        ArgumentError: if the level is outside (0, 1).
        ModuleNotFoundError: without scipy.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import ReliabilityBins
        >>> from lightning_reg.metrics.uncertainty import accuracy_band
        >>> bins = ReliabilityBins(torch.tensor([10]), torch.tensor([9.0]), torch.tensor([10.0]))
        >>> [round(float(end), 4) for end in accuracy_band(bins)]
        [0.6915, 1.0]
    """
    _check_level("accuracy_band", level)
    beta = require("scipy.stats", "demo", "A Clopper-Pearson band").beta
    n = bins.counts.cpu().numpy()
    right, tail = high_precision(bins.correct_sum.cpu()).numpy(), (1 - level) / 2
    # The quantiles do not exist where nothing, or everything, was right; the ends are then exact.
    lower = beta.ppf(tail, np.maximum(right, 1e-300), n - right + 1)
    upper = beta.ppf(1 - tail, right + 1, np.maximum(n - right, 1e-300))
    lower, upper = np.where(right <= 0, 0.0, lower), np.where(right >= n, 1.0, upper)
    return torch.from_numpy(lower), torch.from_numpy(upper)


def chance_error(moments: BinMoments, norm: Norm = "l1") -> Tensor:
    """The error that a perfectly calibrated model with these confidences has by chance.

    The outcomes of such a model in bin b have a mean of variance
    ``v_b = sum_i c_i (1 - c_i) / n_b^2``. The expected l1 error is
    ``sum_b n_b / N sqrt(2 v_b / pi)`` where the mean is normal, as it is in all but the smallest
    bins; the root of the expected squared error is exactly ``sqrt(sum_b n_b / N v_b)``.

    Args:
        moments: what was counted.
        norm: ``"l1"`` or ``"l2"``.
    """
    n = moments.counts.to(moments.confidence_sum)
    variance = (moments.confidence_sum - moments.confidence_square_sum).clamp_min(0)
    variance = variance / n.clamp_min(1).square()
    share = n / n.sum(-1, keepdim=True)
    if norm == "l1":
        return (share * (2 / torch.pi * variance).sqrt()).sum(-1)
    return (share * variance).sum(-1).sqrt()


def bootstrap_errors(
    moments: BinMoments, norm: Norm = "l1", resamples: int = 1000, seed: int = 0
) -> np.ndarray[Any, Any]:
    """The error of samples that are drawn from the bins, (resamples,).

    What is drawn, N of them: predictions of a bin that were right or wrong, each such cell with
    its share of all predictions. So the number of predictions in a bin varies, and how many of
    them are right. The confidences of a cell are their mean and a normal deviation with the
    variance within the cell (pooled over right and wrong ones of a bin), as the sum of that many
    draws from the cell's own confidences has it up to its first two moments. No sample is needed.

    Args:
        moments: (n_bins,) of predictions with labels.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        resamples: how many samples are drawn.
        seed: of NumPy's generator; the same on all ranks, so that they agree.
    """
    cells = _Cells.of(moments)
    total = int(cells.counts.sum())
    if total == 0:
        return np.full(resamples, np.nan)
    generator = np.random.default_rng(seed)
    shape = (resamples, *cells.counts.shape)
    drawn = generator.multinomial(total, cells.counts.ravel() / total, resamples).reshape(shape)
    noise = generator.standard_normal(shape)
    confidences = drawn * cells.mean + np.sqrt(drawn * cells.variance) * noise
    bins = ReliabilityBins(
        *(torch.from_numpy(v) for v in (drawn.sum(2), confidences.sum(2), drawn[..., 1] + 0.0))
    )
    return error_of_bins(bins, norm).numpy()


def bootstrap_interval(
    moments: BinMoments,
    norm: Norm = "l1",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """An interval for the calibration error of the bins, from :func:`bootstrap_errors`.

    A calibration error is too large by chance, and that of a resample once more. Its quantiles
    alone therefore lie too high: near 0 they never hold the true error. Here they are reflected
    about the estimate (``2 e - q``), as errors and as squared errors, which makes up for what
    chance adds, and at each end the farther of the two is taken.

    Args:
        moments: (n_bins,) of predictions with labels.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        level: of confidence.
        resamples: how many samples are drawn.
        seed: of NumPy's generator.

    Note:
        The target is the error of these bins with endless data, which is at most the true
        calibration error: binning averages out what varies within a bin. For each of five kinds
        of simulated models (calibrated, slightly overconfident, over- and underconfident,
        mixed), 1,000 samples of 2,000 predictions each, intervals of level 0.95 held it in 0.935
        to 1.0 of the samples.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import CalibrationError
        >>> from lightning_reg.metrics.uncertainty import bootstrap_interval
        >>> metric = CalibrationError(from_logits=False, task="binary")
        >>> metric.update(torch.full((1000,), 0.7), torch.arange(1000) % 2)
        >>> interval = bootstrap_interval(metric.moments())
        >>> interval.lower < 0.2 < interval.upper
        True
    """
    _check_level("bootstrap_interval", level)
    estimate = float(error_of_bins(moments.bins, norm))
    errors = bootstrap_errors(moments, norm, resamples, seed)
    low, high = (float(q) for q in np.quantile(errors, [(1 - level) / 2, (1 + level) / 2]))
    ends = [
        (2 * estimate - high, 2 * estimate - low),
        tuple(max(2 * estimate**2 - q**2, 0.0) ** 0.5 for q in (high, low)),
    ]
    lower = min(max(end[0], 0.0) for end in ends)
    return Interval(estimate, lower, min(max(end[1] for end in ends), 1.0))


def calibration_uncertainty(
    preds: Tensor, target: Tensor, *, from_logits: bool, **settings: Any
) -> dict[str, Tensor]:
    """A calibration error with its interval, what chance adds, and what the bins make of it.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, (N, ...) for ``"binary"``.
        target: class indices (N, ...).
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        settings: those of :class:`CalibrationUncertainty`.

    Returns:
        The values of :class:`CalibrationUncertainty` by name.

    Example:
        >>> import torch
        >>> chances, target = torch.full((1000,), 0.7), torch.arange(1000) % 2
        >>> values = calibration_uncertainty(chances, target, from_logits=False, task="binary")
        >>> float(values["lower"]) < 0.2 < float(values["upper"])
        True
    """
    metric = CalibrationUncertainty(from_logits=from_logits, **settings)
    value: dict[str, Tensor] = evaluate(metric, preds, target)
    return value


class CalibrationUncertainty(BinnedMetric):
    """A calibration error with its interval, what chance adds, and what the bins make of it.

    ``compute`` returns, by name: ``error``; ``lower`` and ``upper``, the ends of its bootstrap
    interval (:func:`~lightning_reg.metrics.uncertainty.bootstrap_interval`); ``chance``, what a
    perfectly calibrated model would have
    (:func:`~lightning_reg.metrics.uncertainty.chance_error`; not of ``norm="max"``); ``lowest``
    and ``highest``, the least and the largest error over the numbers of bins of ``sweep``. All
    come from the bins: no predictions are kept.

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        level: of the interval.
        resamples: how many samples the bootstrap draws.
        seed: of its generator, so that the value is the same on all ranks and at every call.
        sweep: further numbers of bins.
        kwargs: ``task``, ``n_bins``, ``view`` (not ``"classwise"``), ``top_k``, ``threshold``,
            ``ignore_index`` and ``validate_args`` of
            :class:`~lightning_reg.metrics.binned.BinnedMetric`.

    Note:
        Needs labels: soft targets are neither right nor wrong. Predictions are taken to be
        independent; neighbouring pixels or tokens are not, and intervals are then too narrow.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import CalibrationUncertainty
        >>> metric = CalibrationUncertainty(from_logits=False, task="binary", resamples=200)
        >>> metric.update(torch.full((1000,), 0.7), torch.arange(1000) % 2)
        >>> values = metric.compute()
        >>> float(values["lower"]) < 0.2 < float(values["upper"])
        True
    """

    papers = (
        Paper(
            "The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial",
            "Clopper and Pearson",
            1934,
        ),
        Paper("A Benchmark Study on Calibration", "Tao et al.", 2023, "2308.11838"),
    )
    function = staticmethod(calibration_uncertainty)

    def __init__(
        self,
        *,
        from_logits: bool,
        norm: Norm = "l1",
        level: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
        sweep: tuple[int, ...] = (5, 10, 15, 20, 25, 30, 35, 40, 45, 50),
        **kwargs: Any,
    ) -> None:
        if kwargs.get("view") == "classwise":
            raise ArgumentError(self, "judges one thing at a time", cure='view="top_label"')
        super().__init__(from_logits=from_logits, sweep=sweep, **kwargs)
        if norm not in NORMS:
            raise ArgumentError(
                self, f"`norm` must be one of {', '.join(NORMS)}, got {norm!r}", cure='norm="l1"'
            )
        _check_level(self, level)
        check_range(self, "resamples", resamples, 1, cure="resamples=1000")
        self.norm: Norm = norm
        self.level = level
        self.resamples = resamples
        self.seed = seed

    def accumulate(self, rows: Rows) -> None:
        """Add rows with labels to the bins."""
        targets = self.with_targets(rows).targets
        if targets is not None and targets.is_floating_point():
            raise ArgumentError(
                self,
                "needs labels: soft targets are neither right nor wrong",
                cure="metric.update(logits, target.argmax(1))",
            )
        super().accumulate(rows)

    def band(self) -> tuple[Tensor, Tensor]:
        """The Clopper-Pearson band of the diagram's accuracies at ``level``."""
        return accuracy_band(self.bins(), self.level)

    def value(self) -> dict[str, Tensor]:
        """The values, by name."""
        moments = self.moments()
        interval = bootstrap_interval(moments, self.norm, self.level, self.resamples, self.seed)
        numbers = (self.n_bins, *self.sweep)
        errors = torch.stack([error_of_bins(self.moments(n).bins, self.norm) for n in numbers])
        values = {
            "error": errors[0],
            "lower": errors.new_tensor(interval.lower),
            "upper": errors.new_tensor(interval.upper),
            "lowest": errors.amin(),
            "highest": errors.amax(),
        }
        if self.norm != "max":
            values["chance"] = chance_error(moments, self.norm)
        return values


class _Cells(NamedTuple):
    """Wrong and right predictions of each bin: (n_bins, 2) each.

    Attributes:
        counts: whole numbers.
        mean: of their confidences.
        variance: of their confidences, pooled over the two.
    """

    counts: np.ndarray[Any, Any]
    mean: np.ndarray[Any, Any]
    variance: np.ndarray[Any, Any]

    @classmethod
    def of(cls, moments: BinMoments) -> _Cells:
        m = BinMoments(*(state.cpu() for state in moments))
        right = m.correct_sum.round().to(torch.int64)
        counts = torch.stack([m.counts - right, right], 1).numpy()
        sums = torch.stack([m.confidence_sum - m.joint_sum, m.joint_sum], 1).double().numpy()
        mean = sums / np.maximum(counts, 1)
        square = m.confidence_square_sum.double().numpy() - (counts * mean**2).sum(1)
        variance = np.maximum(square, 0) / np.maximum(counts.sum(1), 1)
        return cls(counts, mean, variance[:, None])


def _check_level(owner: object, level: float) -> None:
    check_range(owner, "level", level, 0.0, 1.0, low_open=True, high_open=True, cure="level=0.95")
