"""All measures of calibration from one pass over the predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_reg.engine.errors import ArgumentError
from lightning_reg.engine.paper import Paper
from lightning_reg.metrics.additive import evaluate
from lightning_reg.metrics.binned import (
    BinnedMetric,
    View,
    check_classes,
    check_width,
    mean_over_classes,
)
from lightning_reg.metrics.binning import (
    BinMoments,
    Grid,
    ReliabilityBins,
    add_class_predictions,
)
from lightning_reg.metrics.brier import brier_of_rows
from lightning_reg.metrics.inputs import (
    BLOCK,
    TASKS,
    Rows,
    Task,
    high_precision,
    probabilities,
)
from lightning_reg.metrics.likelihood import correct_of_rows, nll_of_rows
from lightning_reg.metrics.readings import (
    Norm,
    average_error_of_bins,
    brier_parts,
    debiased_square_error,
    error_of_bins,
    one_sided_error,
    signed_gap,
)

__all__ = ["CalibrationSuite", "calibration_suite"]

SWEEP = (5, 10, 15, 20, 25, 30, 35, 40, 45, 50)


def calibration_suite(
    preds: Tensor, target: Tensor, *, from_logits: bool, **settings: Any
) -> dict[str, Tensor]:
    """Calibration errors of all kinds, proper scores and accuracy.

    Args:
        preds: (N, C, ...) for ``"multiclass"``, (N, ...) for ``"binary"``.
        target: class indices (N, ...), or soft targets of the shape of ``preds``.
        from_logits: whether ``preds`` are logits or probabilities; never guessed.
        settings: those of :class:`CalibrationSuite`.

    Returns:
        The values of :class:`CalibrationSuite` by name.

    Example:
        >>> import torch
        >>> logits, target = torch.eye(4), torch.tensor([0, 1, 2, 0])
        >>> values = calibration_suite(logits, target, from_logits=True)
        >>> float(values["accuracy"])
        0.75
    """
    value: dict[str, Tensor] = evaluate(
        CalibrationSuite(from_logits=from_logits, **settings), preds, target
    )
    return value


class CalibrationSuite(BinnedMetric):
    """All measures of calibration from one pass over the predictions.

    ``compute`` returns, by name:

    - ``ece``, ``rmsce``, ``mce``: the binned calibration error in the l1, l2 and maximum norm,
      with ``n_bins`` bins; ``debiased_rmsce``; ``ace``, in which every bin counts the same
    - ``ece_5`` to ``ece_50``: the ECE at each number of bins of ``sweep``, with ``rmsce_...`` and
      ``mce_...``: one value alone says little, since it depends on the number of bins
    - ``overconfidence`` and ``underconfidence``, which add up to ``ece``; ``confidence_gap``: the
      mean confidence less the mean correctness
    - ``accuracy``, ``nll`` (nats) and ``brier`` (the sum over classes of a multiclass task)
    - ``reliability``, ``resolution``, ``uncertainty``, ``within_bin_variance`` and
      ``within_bin_covariance``: the parts of the mean of ``(confidence - correctness)^2``
    - with ``num_classes``: ``classwise_ece``, ``classwise_rmsce`` and ``classwise_mce``, means
      over classes

    Args:
        from_logits: whether predictions are logits or probabilities; never guessed.
        task: ``"multiclass"`` or ``"binary"``.
        n_bins: the number of equal-width bins.
        sweep: further numbers of bins. All are counted at once, in the cells that their edges
            cut the confidences into.
        num_classes: the number of classes, to count each class too; it multiplies the state.
        view: ``"top_label"``, ``"top_k"`` or ``"positive"``: what is judged; see
            :class:`~lightning_reg.metrics.binned.BinnedMetric`.
        kwargs: ``top_k``, ``threshold``, ``ignore_index`` and ``validate_args`` of
            :class:`~lightning_reg.metrics.binned.BinnedMetric`.

    Note:
        The logits are read once, in blocks that stay in the processor's cache. ``threshold``
        leaves predictions out of the bins, not out of ``accuracy``, ``nll`` and ``brier``.

    Example:
        >>> import torch
        >>> from lightning_reg.metrics import CalibrationSuite
        >>> suite = CalibrationSuite(from_logits=True, sweep=(10, 20))
        >>> suite.update(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
        >>> {name: round(float(v), 4) for name, v in suite.compute().items()}["nll"]
        0.6931
    """

    papers = (Paper("A Benchmark Study on Calibration", "Tao et al.", 2023, "2308.11838"),)
    function = staticmethod(calibration_suite)
    tasks: ClassVar[tuple[str, ...]] = TASKS
    higher_is_better = None
    plot_lower_bound = None
    plot_upper_bound = None
    row_count: Tensor
    hits: Tensor
    nll: Tensor
    brier: Tensor

    def __init__(
        self,
        *,
        from_logits: bool,
        task: Task = "multiclass",
        n_bins: int = 15,
        sweep: Sequence[int] = SWEEP,
        num_classes: int | None = None,
        view: View | None = None,
        **kwargs: Any,
    ) -> None:
        if view == "classwise":
            raise ArgumentError(
                self,
                "judges top labels, and each class beside them",
                cure="CalibrationSuite(from_logits=True, num_classes=10)",
            )
        super().__init__(
            from_logits=from_logits, task=task, n_bins=n_bins, sweep=sweep, view=view, **kwargs
        )
        self.add_count("row_count")
        for name in ("hits", "nll", "brier"):
            self.add_total(name)
        self.block_size = BLOCK
        self.num_classes = num_classes
        if num_classes is not None:
            check_classes(self, num_classes)
            self.class_grid = Grid((n_bins,))
            self.add_count("class_counts", num_classes, n_bins)
            for name in BinMoments._fields[1:]:
                self.add_total(f"class_{name}", num_classes, n_bins)

    def accumulate(self, rows: Rows) -> None:
        """Add rows to all sums."""
        scores, targets = rows.scores, self.with_targets(rows).targets
        assert targets is not None
        chances = probabilities(scores, self.from_logits)
        judged = self.add_rows(rows, chances)
        if self.view == "top_label" and judged is not None:
            hits = high_precision(judged.correct)
        else:
            hits = correct_of_rows(scores, targets, self.from_logits)
        self.row_count += len(scores)
        self.hits += hits.sum().to(self.hits)
        self.nll += self._nll(scores, targets, chances).sum().to(self.nll)
        self.brier += brier_of_rows(chances, targets).sum().to(self.brier)
        if self.num_classes is not None:
            classes = self.class_moments()
            check_width(self, scores, self.num_classes)
            add_class_predictions(classes, self.class_grid, chances, targets)

    def class_moments(self) -> BinMoments:
        """What has been counted of each class, (C, n_bins)."""
        return BinMoments(*(getattr(self, f"class_{name}") for name in BinMoments._fields))

    def value(self) -> dict[str, Tensor]:
        """All values, by name."""
        moments = self.moments()
        bins = moments.bins
        parts = brier_parts(moments)._asdict()
        del parts["brier"]
        values = {
            **_errors(bins),
            "debiased_rmsce": debiased_square_error(moments).clamp_min(0).sqrt(),
            "ace": average_error_of_bins(bins),
            "overconfidence": one_sided_error(bins, 1, weighted=False),
            "underconfidence": one_sided_error(bins, -1, weighted=False),
            "confidence_gap": signed_gap(bins),
            "accuracy": self.hits / self.row_count,
            "nll": self.nll / self.row_count,
            "brier": self.brier / self.row_count,
            **parts,
        }
        for number in self.sweep:
            values |= _errors(self.moments(number).bins, suffix=f"_{number}")
        if self.num_classes is not None:
            errors = _errors(self.class_moments().bins, prefix="classwise_")
            values |= {name: mean_over_classes(error) for name, error in errors.items()}
        return values

    def update_settings(self) -> tuple[Any, ...]:
        """All settings: nothing but another suite counts the same."""
        return ("suite", *super().update_settings())

    def _nll(self, scores: Tensor, targets: Tensor, chances: Tensor) -> Tensor:
        if scores.ndim == 1 or targets.is_floating_point() or not self.from_logits:
            return nll_of_rows(scores, targets, self.from_logits)
        # From what is known already, and finite where the probability is too small for a float.
        own = high_precision(scores.gather(1, targets.unsqueeze(1))).squeeze(1)
        return high_precision(scores.amax(1)) - own - chances.amax(1).log()


def _errors(bins: ReliabilityBins, prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
    names: dict[str, Norm] = {"ece": "l1", "rmsce": "l2", "mce": "max"}
    return {f"{prefix}{name}{suffix}": error_of_bins(bins, norm) for name, norm in names.items()}
